"""A sequence, one output of a call: its life, its workers, a second worker, its text, and the pieces for the API."""
