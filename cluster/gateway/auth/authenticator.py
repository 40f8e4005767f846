"""Who a call is, as the faces and the service ask it; and the answer of a gateway without `auth`: one tenant, no keys.

With `auth` the answers are tenants.py's, which a gateway without it does not even import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.api.outcomes import CallError
from cluster.policy.tenants.identity import Principal
from cluster.policy.tenants.policy import TenantPolicy

ANYBODY = Principal(TenantPolicy("default"), by="nothing")
"""Whoever calls a gateway without `auth`."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a caller shows: every value of `authorization`, the names of a verified certificate, and its address."""

    authorization: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    peer: str = ""


class Caller:
    """Somebody who stays, as a session does: asked again whenever what is known of callers changes."""

    __slots__ = ("principal", "refused", "shown")

    def __init__(self, principal: Principal, shown: Credentials) -> None:
        self.principal = principal
        self.shown = shown
        self.refused: CallError | None = None

    def require(self) -> Principal:
        """Who it is now. Raises CallError."""
        if self.refused is not None:
            raise CallError(
                self.refused.outcome, self.refused.message, retry_after_s=self.refused.retry_after_s
            )  # a new one: it is raised for each call
        return self.principal


class Authenticator(Protocol):
    """`by_certificate`: whether certificates count. `on_change` is called when some tenant's standing may differ."""

    by_certificate: bool
    on_change: set[Callable[[], None]]

    async def principal(self, shown: Credentials) -> Principal:
        """Who it is. Raises CallError: UNAUTHENTICATED_KEY, TENANT_SUSPENDED, STORE_UNAVAILABLE."""

    def knows(self) -> object:
        """The snapshot in which callers are looked up, another object after each change; compare it by identity. Raises
        CallError, STORE_UNAVAILABLE."""

    async def visit(self, shown: Credentials) -> Caller:
        """As `principal`, for somebody who stays until `leave`."""

    def leave(self, visitor: Caller) -> None:
        """A visitor has gone."""

    def standing(self, tenant: str) -> CallError | None:
        """Why a tenant's calls, the running ones too, may not go on; None: they may."""

    def salt(self, principal: Principal, own: str) -> str:
        """The prefix-cache salt of a call; `own` is the caller's, which only divides its tenant's cache further."""


class NoAuthentication:
    """Lets everybody in as the one tenant there is."""

    by_certificate = False

    def __init__(self) -> None:
        self.on_change: set[Callable[[], None]] = set()

    async def principal(self, shown: Credentials) -> Principal:
        """See Door."""
        return ANYBODY

    def knows(self) -> object:
        """See Door."""
        return ANYBODY

    async def visit(self, shown: Credentials) -> Caller:
        """See Door."""
        return Caller(ANYBODY, shown)

    def leave(self, visitor: Caller) -> None:
        """See Door."""

    def standing(self, tenant: str) -> CallError | None:
        """See Door."""
        return None

    def salt(self, principal: Principal, own: str) -> str:
        """See Door."""
        return own


def alternative_names(certificate: Mapping[str, Any] | None) -> tuple[str, ...]:
    """A certificate's URI and DNS names, with their kind before them, from what ssl's getpeercert gives."""
    pairs: Iterable[tuple[str, str]] = (certificate or {}).get("subjectAltName", ())
    return tuple(f"{kind}:{name}" for kind, name in pairs if kind in ("URI", "DNS"))
