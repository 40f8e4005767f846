"""The client libraries' own test suites against a gateway: `make client-suites` runs all of it, `make test` a sample."""
