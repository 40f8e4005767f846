"""Usage records and the prompt log."""
