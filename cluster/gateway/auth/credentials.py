"""Authentication of a call by a bearer token (an API key or an issuer's JWT) or by a client certificate.

If a token is present, the token alone decides. A valid certificate never makes up for a bad token; otherwise a proxy's
certificate would admit every request that the proxy forwards. A call with several tokens is refused: a proxy could have
checked one token and the gateway another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.auth.bearer_tokens import TokenRefused, looks_like_jwt
from cluster.policy.tenants.identity import (
    MAX_KEY_BYTES,
    AccessSnapshot,
    AuthVerdict,
    CertificateRule,
    Principal,
    authenticate,
    identify,
    owner_of_certificate,
    sha256_of,
)

if TYPE_CHECKING:
    from cluster.gateway.auth.oidc import OidcVerifier

NO_CREDENTIALS = "no credentials: send `authorization: Bearer <key>`"


class FailureCallback(Protocol):
    """Function that is called for each failed authentication."""

    def __call__(self, reason: str, subject: str, peer: str) -> None:
        """Handle a failed authentication. Must not block. `reason`: a short code such as `expired`, for audit and
        metrics. `subject`: the claimed key id or subject."""


class CredentialChecker:
    """Turns the credentials of a call into a principal. `current`: returns the newest snapshot of tenants and keys
    (Watcher.current)."""

    def __init__(
        self,
        current: Callable[[], AccessSnapshot],
        *,
        peppers: Sequence[bytes] = (),
        oidc: OidcVerifier | None = None,
        certificates: Sequence[CertificateRule] = (),
        on_failure: FailureCallback | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._current = current
        self._peppers = tuple(peppers)
        self._oidc = oidc
        self._certificates = tuple(certificates)
        self._on_failure = on_failure
        self._clock = clock
        self._valid: dict[bytes, AuthVerdict] = {}
        """Verdicts on the valid keys that callers have presented since the snapshot was taken, keyed by the keys'
        SHA-256."""
        self._snapshot: AccessSnapshot | None = None
        """The snapshot to which `_valid` belongs."""

    async def principal(
        self, authorization: Sequence[str], alternative_names: Sequence[str] = (), peer: str = ""
    ) -> Principal:
        """Authenticate a call and return its principal. `authorization`: all values of the HTTP header or gRPC metadata
        key `authorization`. `alternative_names`: the names in a verified client certificate. Raises CallError:
        UNAUTHENTICATED_KEY, TENANT_SUSPENDED, STORE_UNAVAILABLE."""
        try:
            verdict = await self._verdict(authorization, alternative_names)
        except TokenRefused as refused:
            self._report(refused.reason, "", peer)
            raise
        if verdict.principal is None:
            self._report(verdict.reason, verdict.key_id, peer)
            if verdict.reason == "missing":
                raise CallError(Outcome.UNAUTHENTICATED_KEY, NO_CREDENTIALS)
        return verdict.require()

    def _report(self, reason: str, subject: str, peer: str) -> None:
        if self._on_failure is not None:
            self._on_failure(reason, subject, peer)

    async def _verdict(self, authorization: Sequence[str], names: Sequence[str]) -> AuthVerdict:
        snapshot = self._current()
        if len(authorization) > 1:
            return _refused("several")
        if authorization:
            return await self._token_verdict(snapshot, authorization[0])
        owner = owner_of_certificate(names, self._certificates) if names else None
        if owner is not None:
            return identify(snapshot, owner.tenant, "certificate", owner.name, owner.role)
        return _refused("unknown_certificate" if names and self._certificates else "missing")

    async def _token_verdict(self, snapshot: AccessSnapshot, authorization: str) -> AuthVerdict:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token:
            return _refused("missing")
        if self._oidc is not None and looks_like_jwt(token):
            claims = await self._oidc.verify(token)
            return identify(snapshot, claims.tenant, "jwt", claims.subject, claims.role)
        return self._key_verdict(snapshot, token)

    def _key_verdict(self, snapshot: AccessSnapshot, token: str) -> AuthVerdict:
        """Return the verdict for an API key. A valid key is looked up once per snapshot, an invalid key each time that
        it is presented."""
        now_s = self._clock()
        if snapshot is not self._snapshot:
            self._snapshot, self._valid = snapshot, {}
        sha256 = sha256_of(token) if len(token) <= MAX_KEY_BYTES else b""
        verdict = self._valid.get(sha256)
        if verdict is None or now_s >= verdict.expires_at_s:
            verdict = authenticate(snapshot, token, self._peppers, now_s)
            if verdict.principal is not None:
                self._valid[sha256] = verdict
        return verdict


def _refused(reason: str) -> AuthVerdict:
    return AuthVerdict(None, Outcome.UNAUTHENTICATED_KEY, reason)
