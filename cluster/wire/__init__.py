"""The protocol link.v1 between two processes: codecs, dialing, credit, outboxes and TLS."""
