"""The operating-system processes of an engine: how they start, end, and end together."""
