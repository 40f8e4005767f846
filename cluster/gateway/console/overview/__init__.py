"""The overview: one document about the whole cluster, the parts of which it is made, and the changes that are sent to
consoles."""
