"""A local cluster run by `headrace up`: its processes, ports, run folder and terminal output."""
