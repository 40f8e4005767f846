"""Definitions of all metrics, and the format of the log."""
