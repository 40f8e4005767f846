"""The operating-system processes of an engine: their start, their sockets and their end."""
