"""A local cluster that `headrace up` runs: processes, ports, run folder and terminal output."""
