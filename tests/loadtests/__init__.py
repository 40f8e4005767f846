"""Tests of the load tests: driver, metrics, harness."""
