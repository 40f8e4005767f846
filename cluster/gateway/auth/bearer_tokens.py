"""Bearer tokens that are no keys: which those are, and how one is refused. oidc.py, which checks them, is heavier."""

from __future__ import annotations

from cluster.api.outcomes import CallError, Outcome
from cluster.policy.tenants.identity import BAD_KEY


class TokenRefused(CallError):
    """A token that lets nobody in. The caller is told what a bad key is told; `reason` is for audit and metrics."""

    def __init__(self, reason: str) -> None:
        super().__init__(Outcome.UNAUTHENTICATED_KEY, BAD_KEY)
        self.reason = reason


def looks_like_jwt(token: str) -> bool:
    """Whether a bearer token is an issuer's rather than a key; looks at its first characters only."""
    return token.startswith("eyJ")
