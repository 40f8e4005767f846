"""Definitions of all metrics, and the log format."""
