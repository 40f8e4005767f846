"""The data of the console's plots: the last hour from memory, and longer times from Prometheus."""
