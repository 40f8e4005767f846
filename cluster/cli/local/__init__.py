"""A local cluster in this terminal: its processes, ports, run folder and output."""
