"""cluster.admin.v1."""
