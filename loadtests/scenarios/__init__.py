"""The scenarios by name; each file is one."""
