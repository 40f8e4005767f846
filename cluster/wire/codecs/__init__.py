"""Conversion between the types of this project and protobuf messages, in both directions."""
