"""A cluster of real processes with network namespaces as hosts, started from the rendered chart; see scenarios/hosts."""
