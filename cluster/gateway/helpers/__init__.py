"""Helper processes for work that would hold up the event loop."""
