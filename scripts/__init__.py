"""Scripts that `make` runs: setup, demos, and generators of committed files."""
