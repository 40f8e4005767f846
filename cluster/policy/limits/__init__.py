"""Limits on requests, tokens, budgets and bytes of request bodies."""
