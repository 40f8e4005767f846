"""Parts of a sequence, one output of a call: its workers, a second worker, and the pieces that wait for the API."""
