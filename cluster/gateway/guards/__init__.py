"""Guards: filters of a call's input and output, set in its tenant's policy (docs/guards.md)."""
