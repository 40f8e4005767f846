"""A cluster of real processes on network namespaces as hosts, started from the rendered chart. See scenarios/hosts."""
