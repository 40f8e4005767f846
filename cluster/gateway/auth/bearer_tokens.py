"""A check whether a bearer token is a JWT or an API key, and the error for a refused token.

This module is separate from oidc.py, which verifies JWTs, because oidc.py is slow to import.
"""

from __future__ import annotations

from cluster.api.outcomes import CallError, Outcome
from cluster.policy.tenants.identity import BAD_KEY


class TokenRefused(CallError):
    """The error for a refused token. The caller gets the same message as for a bad key. `reason` is for audit and
    metrics."""

    def __init__(self, reason: str) -> None:
        super().__init__(Outcome.UNAUTHENTICATED_KEY, BAD_KEY)
        self.reason = reason


def looks_like_jwt(token: str) -> bool:
    """Return whether a bearer token is a JWT rather than an API key, judged by the token's first characters only."""
    return token.startswith("eyJ")
