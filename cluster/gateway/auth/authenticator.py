"""The authenticator interface that the APIs and the service use, and its implementation without `auth`.

Without `auth` there is one tenant and no keys. With `auth` the implementation is in tenants.py, which a gateway
without `auth` does not import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.api.outcomes import CallError
from cluster.policy.tenants.identity import Principal
from cluster.policy.tenants.policy import TenantPolicy

DEFAULT_PRINCIPAL = Principal(TenantPolicy("default"), by="nothing")
"""The principal of every call at a gateway without `auth`."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a caller presents: all values of `authorization`, the names in its verified certificate, its address."""

    authorization: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    peer: str = ""


class Caller:
    """A long-lived caller, such as a session, which is authenticated again whenever tenants or keys change."""

    __slots__ = ("credentials", "principal", "refused")

    def __init__(self, principal: Principal, credentials: Credentials) -> None:
        self.principal = principal
        self.credentials = credentials
        self.refused: CallError | None = None

    def require(self) -> Principal:
        """The caller's current principal. Raises CallError when its last authentication failed."""
        if self.refused is not None:
            raise CallError(
                self.refused.outcome, self.refused.message, retry_after_s=self.refused.retry_after_s
            )  # a new exception object for each call
        return self.principal


class Authenticator(Protocol):
    """Turns credentials into principals.

    `by_certificate`: whether client certificates authenticate. `on_change`: callbacks for when any tenant's state may
    have changed.
    """

    by_certificate: bool
    on_change: set[Callable[[], None]]

    async def principal(self, credentials: Credentials) -> Principal:
        """Authenticate. Raises CallError: UNAUTHENTICATED_KEY, TENANT_SUSPENDED, STORE_UNAVAILABLE."""

    def knows(self) -> object:
        """The current snapshot of callers. Each change makes a new object; compare by identity.

        Raises CallError STORE_UNAVAILABLE."""

    async def register(self, credentials: Credentials) -> Caller:
        """Authenticate a long-lived caller and keep it up to date until `leave`. Raises as `principal` does."""

    def unregister(self, caller: Caller) -> None:
        """Stop keeping a caller from `visit` up to date."""

    def tenant_error(self, tenant: str) -> CallError | None:
        """The error with which a tenant's calls, running ones included, must end; None when they may continue."""

    def cache_salt(self, principal: Principal, own: str) -> str:
        """The prefix-cache salt of a call. `own` is the caller's salt; it only subdivides its tenant's cache."""


class NoAuthentication:
    """Accepts every caller as the one default tenant."""

    by_certificate = False

    def __init__(self) -> None:
        self.on_change: set[Callable[[], None]] = set()

    async def principal(self, credentials: Credentials) -> Principal:
        """See Authenticator."""
        return DEFAULT_PRINCIPAL

    def knows(self) -> object:
        """See Authenticator."""
        return DEFAULT_PRINCIPAL

    async def register(self, credentials: Credentials) -> Caller:
        """See Authenticator."""
        return Caller(DEFAULT_PRINCIPAL, credentials)

    def unregister(self, caller: Caller) -> None:
        """See Authenticator."""

    def tenant_error(self, tenant: str) -> CallError | None:
        """See Authenticator."""
        return None

    def cache_salt(self, principal: Principal, own: str) -> str:
        """See Authenticator."""
        return own


def alternative_names(certificate: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The subject alternative names of type URI and DNS, as `kind:name`, from the dict of ssl's getpeercert."""
    pairs: Iterable[tuple[str, str]] = (certificate or {}).get("subjectAltName", ())
    return tuple(f"{kind}:{name}" for kind, name in pairs if kind in ("URI", "DNS"))
