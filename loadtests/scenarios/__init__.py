"""The scenarios by name, one file each."""
