"""A tenant's policy, its identity, and the patterns of its guards."""
