"""Everything that speaks to Ray, and nothing else does."""
