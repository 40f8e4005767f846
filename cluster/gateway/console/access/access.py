"""Access to the console: which session a request belongs to, whether the session is still valid, and what the request
may do.

Every request is checked anew against the current tenants and keys. A request from another site is refused because of
its headers `origin` and `sec-fetch-site`, before its session is looked up. A POST must also hold the CSRF token of its
session. Without `auth` the console serves everybody who reaches the port. The header `host` must then be an IP address,
`localhost`, one of `gateway.host_names` or the host of `public_url`, because an attacker's DNS server can resolve any
other name to this gateway's address (apis/http/host_names.py).
"""

from __future__ import annotations

import hmac
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from cluster.api.outcomes import CallError, Outcome
from cluster.config.gateway import GatewaySettings, is_loopback
from cluster.gateway.apis.admin.authorization import LOOPBACK_OPERATOR
from cluster.gateway.apis.http.body import Refused
from cluster.gateway.apis.http.exchange import Exchange
from cluster.gateway.apis.http.host_names import host_name, is_local, misdirected
from cluster.gateway.auth.authenticator import DEFAULT_PRINCIPAL
from cluster.gateway.console.access.sessions import ConsoleSession, SessionCookie, cookie_in, cookie_name, set_cookie
from cluster.policy.tenants.identity import Principal, authenticate_again, identify, is_allowed

if TYPE_CHECKING:
    from cluster.gateway.auth.tenants import TenantAuthenticator

ALWAYS: Final = ("operator", "viewer")
"""Roles that may sign in whatever `gateway.console.tenants` says."""
SIGNED_OUT: Final = "sign in: there is no session, or it has ended"
_VIEWER_PRINCIPAL: Final = replace(LOOPBACK_OPERATOR, role="viewer")


@dataclass(frozen=True, slots=True)
class Viewer:
    """A signed-in person. `principal`: the principal of the viewer's admin requests. `caller`: the principal of the
    viewer's calls to models."""

    session: ConsoleSession
    principal: Principal
    caller: Principal

    @property
    def scope(self) -> str:
        """The only tenant that the viewer may see; "" for all tenants."""
        return "" if is_allowed(self.principal, "read") else self.principal.tenant.name


class ConsoleAccess:
    """Begins and checks the console's sessions at one gateway process."""

    def __init__(
        self,
        settings: GatewaySettings,
        tenants: TenantAuthenticator | None,
        secrets: Callable[[], Sequence[bytes]],
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`secrets`: returns the cluster's secrets. `wall`: returns seconds since the epoch."""
        self._settings = settings.console
        self._tenants = tenants
        self._wall = wall
        self._public_host = urllib.parse.urlsplit(settings.console.public_url).netloc.lower()
        self._host_names = settings.host_names
        self.has_auth = tenants is not None
        self.is_secure = settings.tls is not None or settings.console.public_url.startswith("https:")
        self._cookie = SessionCookie(secrets, cookie_name(self.is_secure))
        self._anyone = LOOPBACK_OPERATOR if is_loopback(settings.listen.http) else _VIEWER_PRINCIPAL

    # ---- requests

    def check_site(self, exchange: Exchange) -> None:
        """Raise Refused for a request that another site has caused. If the configuration has no section `auth`, also
        raise Refused for a header `host` that is not allowed."""
        host = exchange.header(b"host").lower()
        if not self.has_auth and host != self._public_host:
            name = host_name(host)
            if not is_local(name) and name not in self._host_names:
                raise misdirected(host)
        if exchange.header(b"sec-fetch-site") not in ("", "same-origin", "none"):
            raise Refused(403, "cross_site", "the request comes from another site; use the console's own page")
        origin = exchange.header(b"origin").lower()
        if origin and urllib.parse.urlsplit(origin).netloc not in {host, self._public_host} - {""}:
            raise Refused(403, "cross_site", "`origin` is another site than this host; use the console's own page")

    def viewer(self, exchange: Exchange) -> Viewer:
        """Return the viewer of a request. Raises Refused for a request that another site has caused and for a POST
        without the CSRF token. Raises CallError if there is no session or the session has ended."""
        self.check_site(exchange)
        session = self.session(exchange)
        if session is None:
            raise CallError(Outcome.UNAUTHENTICATED_KEY, SIGNED_OUT)
        viewer = self.check(session)
        if exchange.scope["method"] == "POST":
            self.check_token(exchange, session)
        return viewer

    @staticmethod
    def check_token(exchange: Exchange, session: ConsoleSession) -> None:
        """Raise Refused if a request does not hold the CSRF token of its session."""
        if not hmac.compare_digest(exchange.header(b"x-csrf-token").encode(), session.csrf.encode()):
            raise Refused(403, "csrf", "the header x-csrf-token must hold the session's token (GET /console/session)")

    def session(self, exchange: Exchange) -> ConsoleSession | None:
        """Return the session in a request's cookie; None if there is no valid cookie. The session's key, tenant and
        role are not checked here, so `check` must follow."""
        return self._cookie.open(cookie_in(exchange.header(b"cookie"), self._cookie.name), self._wall())

    def check(self, session: ConsoleSession) -> Viewer:
        """Return the viewer of a session. Raises CallError if the session has expired, if its key or tenant may no
        longer be used, or if its role may not sign in."""
        now_s = self._wall()
        if now_s >= session.expires_at_s or (session.by == "nobody") != (self._tenants is None):
            raise CallError(Outcome.UNAUTHENTICATED_KEY, SIGNED_OUT)
        if self._tenants is None:
            return Viewer(session, self._anyone, DEFAULT_PRINCIPAL)
        snapshot = self._tenants.snapshot()
        if session.by == "key":
            verdict = authenticate_again(snapshot, bytes.fromhex(session.digest), now_s)
        else:
            verdict = identify(snapshot, session.tenant, session.by, session.subject, session.role)
        if verdict.outcome is Outcome.UNAUTHENTICATED_KEY:
            raise CallError(Outcome.UNAUTHENTICATED_KEY, SIGNED_OUT)
        principal = self._tenants.derived.with_handle(verdict.require())
        self.check_role(principal.role)
        return Viewer(session, principal, principal)

    def check_role(self, role: str) -> None:
        """Raise CallError if the role may not sign in."""
        if role not in ALWAYS and not self._settings.tenants:
            text = f"the role {role} may not sign in: gateway.console.tenants is false; ask the cluster's operators"
            raise CallError(Outcome.PERMISSION_DENIED, text)

    # ---- sessions

    def begin(self, by: str, principal: Principal, digest: bytes = b"") -> ConsoleSession:
        """Return a new session. `by`: the kind of credential: `key`, `jwt`, or `nobody` at a gateway without `auth`.
        `digest`: the stored digest of the key, if the credential is a key."""
        expires_at_s = self._wall() + self._settings.session_s
        return ConsoleSession.begin(
            by,
            principal.subject,
            principal.tenant.name,
            principal.role,
            expires_at_s=expires_at_s,
            digest=digest.hex(),
        )

    def seconds_left(self, session: ConsoleSession) -> float:
        """Return the seconds until a session expires."""
        return max(session.expires_at_s - self._wall(), 0.0)

    def without_auth(self) -> ConsoleSession:
        """Return a new session at a gateway without `auth`."""
        return self.begin("nobody", self._anyone)

    def cookie(self, session: ConsoleSession | None) -> tuple[bytes, bytes]:
        """Return the response header that stores a session in the browser. With None, the header removes the stored
        session."""
        value = self._cookie.seal(session) if session is not None else ""
        max_age_s = self.seconds_left(session) if session is not None else 0.0
        return b"set-cookie", set_cookie(self._cookie.name, value, max_age_s=max_age_s, is_secure=self.is_secure)
