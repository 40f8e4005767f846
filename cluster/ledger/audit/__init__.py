"""The audit log, as a file of JSON lines and as a database table."""
