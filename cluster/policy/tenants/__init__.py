"""Policies and identities of tenants, and the patterns of their guards (checks of prompts and outputs)."""
