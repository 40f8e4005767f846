"""Exchange of the console's data between gateway processes."""
