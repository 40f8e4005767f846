"""Tests of the load tests: the driver, the metrics and the harness."""
