"""The serving sides of load tests: processes that a scenario starts, and the programs of these processes."""
