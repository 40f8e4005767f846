"""A seeded world that drives tenancy, routing and control unchanged."""
