"""The other gateway processes, as the console sees them."""
