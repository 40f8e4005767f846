"""Policy and identity of a tenant, and the patterns of its guards."""
