"""The overview: one document about the whole cluster, and its parts and changes."""
