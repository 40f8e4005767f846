"""Limits on requests, tokens, budgets and request bodies in bytes."""
