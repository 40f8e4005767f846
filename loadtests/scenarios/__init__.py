"""Scenarios by name, one file each."""
