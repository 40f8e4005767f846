"""Guards: filters of the prompts and outputs of calls. A tenant's policy sets them (docs/guards.md)."""
