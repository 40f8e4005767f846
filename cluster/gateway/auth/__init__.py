"""Authentication of callers (API keys, JWTs, client certificates) and TLS of the ports."""
