"""Tenants and API keys in the ledger."""
