"""Guards: filters on a call's input and output that its tenant's policy names (docs/guards.md)."""
