"""The console: the state of the cluster as pages and event streams show it."""
