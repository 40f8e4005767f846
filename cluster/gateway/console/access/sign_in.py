"""Sign-in with a key, and sign-out.

A valid key always signs in, whatever its address did before: other people may have the same address, and keys need no
protection against guessing, because they have 256 random bits. Failures are limited for each source address, and
sign-ins for each key or subject. So both write a bounded number of lines into the audit log.
"""

from __future__ import annotations

import ipaddress
import time
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
from cluster.policy.tenants.identity import BAD_KEY, Principal, authenticate, key_of

if TYPE_CHECKING:
    from cluster.gateway.auth.tenants import TenantAuthenticator

FAILURES_PER_S: Final = 0.2
FAILURES: Final = 10.0
"""Number of failed sign-ins that an address may make at once, refilled at FAILURES_PER_S."""
SIGN_INS_PER_S: Final = 0.2
SIGN_INS: Final = 60.0
"""Number of sign-ins that a key or subject may make at once, refilled at SIGN_INS_PER_S."""
MAX_SOURCES: Final = 4096
IPV6_PREFIX: Final = 64
MAX_BODY_BYTES: Final = 4096
OIDC_START: Final = "/console/sign-in/oidc"
OIDC_CALLBACK: Final = f"{OIDC_START}/callback"


class SourceLimits:
    """A token bucket for each source. A bucket never holds less than nothing, so the wait is bounded, too. Times are
    monotonic seconds."""

    def __init__(self, per_s: float, at_once: float, message: str) -> None:
        """`message`: the text of the error."""
        self._per_s, self._at_once, self._message = per_s, at_once, message
        self._buckets: dict[str, Bucket] = {}

    def charge(self, source: str, now: float) -> None:
        """Charge one attempt to a source. Raises CallError RATE_LIMITED, and charges nothing, if the source has made
        too many. If there are more than MAX_SOURCES sources, the one that was charged least recently is forgotten."""
        bucket = self._buckets.pop(source, None) or Bucket(self._per_s, self._at_once, now)
        self._buckets[source] = bucket
        if len(self._buckets) > MAX_SOURCES:
            del self._buckets[next(iter(self._buckets))]
        if (left := bucket.charge(0, now)) < 1:
            raise CallError(Outcome.RATE_LIMITED, self._message, retry_after_s=(1 - left) / self._per_s)
        bucket.charge(1, now)


def source_of(exchange: Exchange) -> str:
    """Return the source of a request: the client's IPv4 address, or the network of its IPv6 address."""
    return source_of_address(str((exchange.scope.get("client") or ("", 0))[0]))


def source_of_address(address: str) -> str:
    """Return the source to which an address belongs."""
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
        clock: Callable[[], float],
    ) -> None:
        """`clock`: returns monotonic seconds."""
        self._access = access
        self._tenants = tenants
        self._bodies = bodies
        self._authorizer = authorizer
        self._failures = SourceLimits(FAILURES_PER_S, FAILURES, "too many wrong keys from this address; wait")
        self._sign_ins = SourceLimits(SIGN_INS_PER_S, SIGN_INS, "too many sign-ins; keep the session's cookie, or wait")
        self._clock = clock

    async def sign_in(self, exchange: Exchange) -> None:
        """Begin a session for the key in the body, `{"key": "..."}`."""
        self._access.check_site(exchange)
        if self._tenants is None:
            raise Refused(409, "no_auth", "this gateway has no `auth`, so there is nothing to sign in with")
        key = await self._key(exchange)
        if authenticate(self._tenants.snapshot(), key, self._tenants.peppers, time.time()).principal is None:
            self._failures.charge(source_of(exchange), self._clock())
        principal, digest = await self._principal(self._tenants, key, exchange)
        self._access.check_role(principal.role)
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
        """Record a sign-in in the audit log. Raises CallError if the key or subject has signed in too often."""
        self._sign_ins.charge(f"{principal.by}:{principal.tenant.name}:{principal.subject}", self._clock())
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


async def no_content(exchange: Exchange, *headers: tuple[bytes, bytes]) -> None:
    """Answer 204."""
    await exchange.start(204, [NO_STORE, *headers])
    await exchange.send({"type": "http.response.body", "body": b"", "more_body": False})
