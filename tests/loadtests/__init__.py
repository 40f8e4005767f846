"""The load tests themselves: driver, metrics, harness."""
