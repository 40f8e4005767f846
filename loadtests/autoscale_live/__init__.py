"""Live test of scaling: replicas with simulated engines on a real Ray with Ray Serve, while streams run. `python -m
loadtests.autoscale_live`.
"""
