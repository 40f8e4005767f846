"""The protocol link.v1 between any two processes: codecs, dialing, credit, outboxes, TLS. No process's state."""
