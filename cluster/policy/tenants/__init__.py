"""A tenant: its policy, its identity, and the patterns of its guards."""
