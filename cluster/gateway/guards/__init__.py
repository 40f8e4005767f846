"""Guards: filters of the prompts and outputs of calls, set in the policy of a tenant (docs/guards.md)."""
