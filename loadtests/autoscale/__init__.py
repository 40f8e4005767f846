"""Baselines for the autoscaler: demand from traces, the clairvoyant optimum, Ray Serve's policy, static placement."""
