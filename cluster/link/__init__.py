"""The wire between a gateway (hub) and those who dial in: workers and the controller."""
