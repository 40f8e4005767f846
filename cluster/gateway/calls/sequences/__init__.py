"""A sequence, one output of a call: its state, its workers, its text, and the pieces of text for the API."""
