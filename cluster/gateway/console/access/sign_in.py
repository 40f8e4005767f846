"""Sign-in with a key, and sign-out.

Failed sign-ins are limited for each source address; the limit is checked before the key is looked up. Each failure is
recorded in the audit log, as on the other ports. The limit bounds the work and the size of the audit log. Keys need no
protection against guessing, because they have 256 random bits.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import orjson

from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.gateway.apis.admin.authorization import AdminAuthorizer, AdminCaller
from cluster.gateway.apis.http.body import Refused, RequestBodies
from cluster.gateway.apis.http.exchange import Exchange
from cluster.gateway.apis.http.protocol import CONNECTION
from cluster.gateway.auth.authenticator import Credentials
from cluster.gateway.auth.bearer_tokens import looks_like_jwt
from cluster.gateway.console.access.access import ConsoleAccess
from cluster.gateway.console.access.sessions import ConsoleSession
from cluster.gateway.console.errors import NO_STORE
from cluster.http2.limits import Bucket
from cluster.policy.tenants.identity import BAD_KEY, Principal, key_of

if TYPE_CHECKING:
    from cluster.gateway.auth.tenants import TenantAuthenticator

FAILURES_PER_S: Final = 0.2
FAILURES: Final = 10.0
"""Number of failed sign-ins that an address may make at once, refilled at FAILURES_PER_S."""
MAX_SOURCES: Final = 4096
IPV6_PREFIX: Final = 64
MAX_BODY_BYTES: Final = 4096
OIDC_START: Final = "/console/sign-in/oidc"
OIDC_CALLBACK: Final = f"{OIDC_START}/callback"


class FailureLimits:
    """The limits of failed sign-ins, one for each source. A source is an IPv4 address, or the network of an IPv6
    address. All times are monotonic seconds."""

    def __init__(self) -> None:
        self._buckets: dict[str, Bucket] = {}

    def check(self, address: str, now: float) -> None:
        """Raise CallError RATE_LIMITED if too many sign-ins from the source of `address` have failed."""
        bucket = self._buckets.get(_source(address))
        if bucket is not None and (left := bucket.charge(0, now)) < 1:
            delay_s = (1 - left) / FAILURES_PER_S
            raise CallError(
                Outcome.RATE_LIMITED, "too many failed sign-ins from this address; wait", retry_after_s=delay_s
            )

    def count(self, address: str, now: float) -> None:
        """Count a failed sign-in from `address`. The count belongs to the source of the address: the IPv4 address
        itself, or the network of an IPv6 address. If there are more than MAX_SOURCES sources, the source whose last
        failure is the oldest is forgotten."""
        source = _source(address)
        bucket = self._buckets.pop(source, None) or Bucket(FAILURES_PER_S, FAILURES, now)
        bucket.charge(1, now)
        self._buckets[source] = bucket
        if len(self._buckets) > MAX_SOURCES:
            del self._buckets[next(iter(self._buckets))]


def _source(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 4:
        return address
    return str(ipaddress.ip_network((parsed, IPV6_PREFIX), strict=False))


class KeySignIn:
    """The endpoints of sign-in with a key, and of sign-out."""

    def __init__(
        self,
        access: ConsoleAccess,
        tenants: TenantAuthenticator | None,
        bodies: RequestBodies,
        authorizer: AdminAuthorizer,
        limits: FailureLimits,
        clock: Callable[[], float],
    ) -> None:
        """Create the endpoints. `limits`: limits on failed sign-ins, which are shared with the other ways to sign in.
        `clock`: returns monotonic seconds."""
        self._access = access
        self._tenants = tenants
        self._bodies = bodies
        self._authorizer = authorizer
        self._limits = limits
        self._clock = clock

    async def sign_in(self, exchange: Exchange) -> None:
        """Begin a session for the key in the body, `{"key": "..."}`."""
        self._access.check_site(exchange)
        if self._tenants is None:
            raise Refused(409, "no_auth", "this gateway has no `auth`, so there is nothing to sign in with")
        address = address_of(exchange)
        self._limits.check(address, self._clock())
        key = await self._key(exchange)
        try:
            principal, digest = await self._principal(self._tenants, key, exchange)
            self._access.check_role(principal.role)
        except CallError as error:
            if error.outcome is not Outcome.STORE_UNAVAILABLE:
                self._limits.count(address, self._clock())
            raise
        self.record(principal, exchange)
        await no_content(exchange, self._access.cookie(self._access.begin("key", principal, digest)))

    async def _key(self, exchange: Exchange) -> str:
        if not exchange.headers.get(b"content-type", b"").startswith(b"application/json"):
            raise Refused(415, "unsupported_media_type", "content-type must be application/json")
        length = exchange.headers.get(b"content-length", b"")
        async with self._bodies.read(exchange.receive, exchange.scope[CONNECTION], length, "") as content:
            try:
                body = orjson.loads(content)
            except orjson.JSONDecodeError:
                raise invalid("", "the body is no JSON object") from None
        key = body.get("key") if isinstance(body, dict) else None
        if not isinstance(key, str) or not key.strip():
            raise invalid("key", 'must be a text: send {"key": "hr_..."}')
        return key.strip()

    @staticmethod
    async def _principal(tenants: TenantAuthenticator, key: str, exchange: Exchange) -> tuple[Principal, bytes]:
        """Return the principal of a key and the stored digest of the key. Raises CallError for an invalid key and for a
        JWT."""
        refused = CallError(Outcome.UNAUTHENTICATED_KEY, BAD_KEY)
        if looks_like_jwt(key):  # a session would outlive the token
            raise refused
        principal = await tenants.principal(Credentials((f"Bearer {key}",), (), exchange.credentials(False).peer))
        entry = key_of(tenants.snapshot(), key, tenants.peppers)
        if entry is None:
            raise refused
        return principal, entry.digest

    def record(self, principal: Principal, exchange: Exchange) -> None:
        """Record a sign-in in the audit log."""
        exchange.scope[CONNECTION].mark_authenticated()
        caller = AdminCaller(principal, exchange.credentials(False).peer, "")
        name = principal.tenant.name
        self._authorizer.audit(caller, "admin", "console.sign_in", f"tenants/{name}", tenant=name)

    async def sign_out(self, exchange: Exchange) -> None:
        """Remove the session from the browser. Raises Refused if the session is valid and the request lacks its CSRF
        token."""
        self._access.check_site(exchange)
        session: ConsoleSession | None = self._access.session(exchange)
        if session is not None:
            self._access.check_token(exchange, session)
        await no_content(exchange, self._access.cookie(None))


def address_of(exchange: Exchange) -> str:
    """Return the IP address of the client."""
    return str((exchange.scope.get("client") or ("", 0))[0])


async def no_content(exchange: Exchange, *headers: tuple[bytes, bytes]) -> None:
    """Answer 204."""
    await exchange.start(204, [NO_STORE, *headers])
    await exchange.send({"type": "http.response.body", "body": b"", "more_body": False})
