"""The audit log, as JSON lines and as a table."""
