"""The protocol link.v1 between a gateway and a worker or controller: codecs, dialing, credit, outboxes and TLS."""
