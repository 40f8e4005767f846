"""The distinction of JWTs from API keys, and the error for a refused token.

Separate from oidc.py, which verifies JWTs, because that module is slow to import.
"""

from __future__ import annotations

from cluster.api.outcomes import CallError, Outcome
from cluster.policy.tenants.identity import BAD_KEY


class TokenRefused(CallError):
    """A refused token. The caller gets the same message as for a bad key; `reason` is for audit and metrics."""

    def __init__(self, reason: str) -> None:
        super().__init__(Outcome.UNAUTHENTICATED_KEY, BAD_KEY)
        self.reason = reason


def looks_like_jwt(token: str) -> bool:
    """Whether a bearer token is a JWT rather than an API key, by its first characters only."""
    return token.startswith("eyJ")
