"""The HTTP/1 server: bounds, timeouts and request bodies."""
