"""Scaling on a real Ray with Serve under streams, with simulated engines: `python -m loadtests.autoscale_live`."""
