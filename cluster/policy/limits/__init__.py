"""Limits on requests, tokens, budgets and the bytes of request bodies."""
