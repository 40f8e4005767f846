"""The admin API, cluster.admin.v1."""
