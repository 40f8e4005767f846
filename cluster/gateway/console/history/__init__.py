"""Plots: the last hour in memory, and longer times from Prometheus."""
