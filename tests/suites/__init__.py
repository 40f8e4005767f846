"""The client libraries' own tests against a gateway: `make client-suites` runs all of them, `make test` a sample."""
