"""What `make` runs, and what keeps generated files at their sources."""
