"""Live test of scaling: replicas with simulated engines on a real Ray with Ray Serve, while streams run.

Run it with `python -m loadtests.autoscale_live`.
"""
