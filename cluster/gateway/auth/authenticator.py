"""The authenticator interface, which the APIs and the CallService use, and the implementation for a gateway whose
configuration has no section `auth`.

Without this section there is one tenant and no keys. The implementation for a gateway with this section is in
tenants.py, which is imported only if the section exists.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Protocol

import structlog

from cluster.api.frozen import frozen_dataclass
from cluster.api.outcomes import CallError, Outcome
from cluster.policy.tenants.identity import Principal
from cluster.policy.tenants.policy import TenantPolicy

log = structlog.get_logger("auth")

DEFAULT_PRINCIPAL = Principal(TenantPolicy("default"), by="nothing")
"""The principal of every call at a gateway without `auth`."""
REAUTHENTICATE_S = 30.0
"""Seconds after which callers are authenticated again even if nothing has changed, since keys and tokens expire."""


@frozen_dataclass
class Credentials:
    """Credentials that a caller presents: all values of the header `authorization`, the names in the caller's verified
    certificate, and the caller's address."""

    authorization: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    peer: str = ""


class Caller:
    """A long-lived caller, such as a session. The caller is authenticated again whenever tenants or keys change."""

    __slots__ = ("credentials", "principal", "refused")

    def __init__(self, principal: Principal, credentials: Credentials) -> None:
        self.principal = principal
        self.credentials = credentials
        self.refused: CallError | None = None

    async def authenticate(self, authenticate: Callable[[Credentials], Awaitable[Principal]]) -> None:
        """Authenticate the caller again. `authenticate`: returns the principal for given credentials. If `authenticate`
        raises CallError, the caller's calls are refused until a later authentication succeeds."""
        try:
            self.principal, self.refused = await authenticate(self.credentials), None
        except CallError as error:
            self.refused = error
        except Exception:  # must neither admit this caller nor end the check of the others
            log.exception("auth.check_failed", peer=self.credentials.peer)
            self.refused = CallError(Outcome.INTERNAL, "the credential could not be checked; try again")

    def require(self) -> Principal:
        """Return the caller's current principal. Raises CallError if the caller's last authentication failed."""
        if self.refused is not None:
            raise CallError(
                self.refused.outcome, self.refused.message, retry_after_s=self.refused.retry_after_s
            )  # each call gets a new exception object
        return self.principal


class RegisteredCallers:
    """Callers whose credentials are checked again while they are registered: periodically, and after each change of
    tenants or keys."""

    def __init__(self, authenticate: Callable[[Credentials], Awaitable[Principal]]) -> None:
        """`authenticate`: returns the principal for a caller's credentials, or raises CallError."""
        self._authenticate = authenticate
        self._callers: set[Caller] = set()
        self._changed = asyncio.Event()

    async def register(self, credentials: Credentials) -> Caller:
        """Implements `Authenticator.register`."""
        caller = Caller(await self._authenticate(credentials), credentials)
        self._callers.add(caller)
        return caller

    def unregister(self, caller: Caller) -> None:
        """Implements `Authenticator.unregister`."""
        self._callers.discard(caller)

    def mark_changed(self) -> None:
        """Authenticate all callers again soon, because a tenant or a key has changed."""
        self._changed.set()

    async def reauthenticate(self) -> None:
        """Authenticate all callers again after each call of `mark_changed`, and periodically. Runs until cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(REAUTHENTICATE_S):
                    await self._changed.wait()
            self._changed.clear()
            for number, caller in enumerate(list(self._callers)):
                await caller.authenticate(self._authenticate)
                if number % 100 == 99:
                    await asyncio.sleep(0)  # thousands of sessions must not block the event loop


class Authenticator(Protocol):
    """Authenticator of callers, which turns credentials into principals.

    `by_certificate`: whether client certificates authenticate callers. `on_change`: functions that are called when the
    state of any tenant may have changed.
    """

    by_certificate: bool
    on_change: set[Callable[[], None]]

    async def principal(self, credentials: Credentials) -> Principal:
        """Authenticate a caller and return its principal. Raises CallError: UNAUTHENTICATED_KEY, TENANT_SUSPENDED,
        STORE_UNAVAILABLE."""

    def knows(self) -> object:
        """Return an object that identifies the current state of the tenants and keys. After each change another object
        is returned, so compare the objects by identity.

        Raises CallError STORE_UNAVAILABLE."""

    async def register(self, credentials: Credentials) -> Caller:
        """Authenticate a long-lived caller and keep its principal up to date until `unregister`. Raises the same errors
        as `principal`."""

    def unregister(self, caller: Caller) -> None:
        """Stop keeping the principal of a registered caller up to date."""

    def tenant_error(self, tenant: str) -> CallError | None:
        """Return the error with which all calls of a tenant must end, running calls included. None if the calls may
        continue."""

    def cache_salt(self, principal: Principal, own: str) -> str:
        """Return the prefix-cache salt of a call: only calls with equal salts share cached prefixes. `own`: the salt in
        the request, which only subdivides the tenant's cache; "" for none."""


class NoAuthentication:
    """Authenticator that accepts every caller as the default tenant."""

    by_certificate = False

    def __init__(self) -> None:
        self.on_change: set[Callable[[], None]] = set()

    async def principal(self, credentials: Credentials) -> Principal:
        """Implements `Authenticator.principal`."""
        return DEFAULT_PRINCIPAL

    def knows(self) -> object:
        """Implements `Authenticator.knows`."""
        return DEFAULT_PRINCIPAL

    async def register(self, credentials: Credentials) -> Caller:
        """Implements `Authenticator.register`."""
        return Caller(DEFAULT_PRINCIPAL, credentials)

    def unregister(self, caller: Caller) -> None:
        """Implements `Authenticator.unregister`."""

    def tenant_error(self, tenant: str) -> CallError | None:
        """Implements `Authenticator.tenant_error`."""
        return None

    def cache_salt(self, principal: Principal, own: str) -> str:
        """Implements `Authenticator.cache_salt`."""
        return own


def alternative_names(certificate: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return a certificate's subject alternative names of the types URI and DNS, as `kind:name`. `certificate`: the
    dict from the `getpeercert` method of Python's ssl module."""
    pairs: Iterable[tuple[str, str]] = (certificate or {}).get("subjectAltName", ())
    return tuple(f"{kind}:{name}" for kind, name in pairs if kind in ("URI", "DNS"))
