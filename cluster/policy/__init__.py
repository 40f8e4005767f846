"""Pure policy decisions: no clock, no randomness, no I/O. The processes and the simulator run the same objects."""
