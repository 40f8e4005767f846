"""Decisions, pure: no clock, no chance, no I/O. The processes and the simulator run the same objects."""
