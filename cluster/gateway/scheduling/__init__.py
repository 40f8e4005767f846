"""Queueing of a gateway's sequences, and sending to workers, as the scheduling policy decides."""
