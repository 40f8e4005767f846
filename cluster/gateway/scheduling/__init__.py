"""Queues a gateway's sequences and sends them to workers, as the scheduling policy decides."""
