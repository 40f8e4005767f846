"""Scheduling of waiting sequences to workers."""
