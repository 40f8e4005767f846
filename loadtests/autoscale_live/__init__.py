"""Scaling on a real Ray and Serve under streams, with simulated engines: `python -m loadtests.autoscale_live`."""
