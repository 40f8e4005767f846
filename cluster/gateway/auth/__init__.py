"""Callers: API keys, JWTs, certificates and the TLS of the ports."""
