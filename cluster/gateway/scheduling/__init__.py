"""Queueing a gateway's sequences and sending them to workers, as the scheduling policy decides."""
