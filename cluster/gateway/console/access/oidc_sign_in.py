"""The endpoints of sign-in with an OpenID issuer. After a failed sign-in, the console's page shows the reason."""

from __future__ import annotations

import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import structlog

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.apis.http.body import Refused
from cluster.gateway.apis.http.exchange import Exchange
from cluster.gateway.calls.records.access_log import LineBudget
from cluster.gateway.console.access.access import ConsoleAccess
from cluster.gateway.console.access.oidc_flow import FLOW_S, FlowError, FlowState, OidcFlow
from cluster.gateway.console.access.sessions import SealedCookie, cookie_in, cookie_name, set_cookie
from cluster.gateway.console.access.sign_in import KeySignIn, source_of
from cluster.gateway.console.errors import NO_STORE
from cluster.policy.tenants.identity import identify

if TYPE_CHECKING:
    from cluster.gateway.auth.tenants import TenantAuthenticator

log = structlog.get_logger("console")

MAX_QUERY_BYTES: Final = 8192
MAX_DETAIL: Final = 200
LINES_PER_S: Final = 5


class OidcSignIn:
    """Sign-in with an OpenID issuer at one gateway process."""

    def __init__(
        self,
        flow: OidcFlow,
        access: ConsoleAccess,
        tenants: TenantAuthenticator,
        keys: KeySignIn,
        secrets: Callable[[], Sequence[bytes]],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`keys`: records sign-ins in the audit log. `clock`: monotonic seconds. `wall`: returns seconds since the
        epoch."""
        self.flow = flow
        self._access = access
        self._tenants = tenants
        self._keys = keys
        self._lines = LineBudget(LINES_PER_S)
        self._cookie = SealedCookie(secrets, "console-oidc")
        self._name = cookie_name(access.is_secure, "-oidc")
        self._clock = clock
        self._wall = wall

    async def start(self, exchange: Exchange) -> None:
        """Redirect the browser to the issuer's sign-in page. Beginnings are not counted by address, so that none keeps
        another out: each costs no more than another page, since the issuer's addresses are fetched for all at once."""
        state = FlowState.begin(self._wall())
        try:
            url = await self.flow.authorization_url(state)
        except FlowError as error:
            await self._failed(exchange, error)
            return
        await _redirect(exchange, url, self._flow_cookie(self._cookie.seal(state.as_json()), FLOW_S))

    async def finish(self, exchange: Exchange) -> None:
        """Begin a session for the person who has signed in at the issuer, and redirect the browser to the console's
        page."""
        try:
            session_cookie = await self._session_cookie(exchange)
        except FlowError as error:
            await self._failed(exchange, error)
            return
        await _redirect(exchange, "/", self._flow_cookie("", 0), session_cookie)

    async def _session_cookie(self, exchange: Exchange) -> tuple[bytes, bytes]:
        """Return the header with the cookie of the new session. Raises FlowError."""
        text = cookie_in(exchange.header(b"cookie"), self._name)
        state = FlowState.from_json(self._cookie.open(text))
        if state is None:
            raise FlowError("expired", "the browser sent no cookie of a sign-in")
        claims = await self.flow.finish(state, _query(exchange), self._wall(), source_of(exchange))
        try:
            verdict = identify(self._tenants.snapshot(), claims.tenant, "jwt", claims.subject, claims.role)
            principal = self._tenants.derived.with_handle(verdict.require())
            self._access.check_role(principal.role)
        except CallError as error:
            reason = {Outcome.TENANT_SUSPENDED: "suspended", Outcome.PERMISSION_DENIED: "role"}.get(error.outcome)
            raise FlowError(reason or "tenant", error.message) from None
        self._keys.record(principal, exchange)
        return self._access.cookie(self._access.begin("jwt", principal))

    async def _failed(self, exchange: Exchange, error: FlowError) -> None:
        detail = "".join(filter(str.isprintable, str(error)))[:MAX_DETAIL]
        left_out = self._lines.take(self._clock())
        if left_out is not None:
            log.warning(
                "console.sign_in_failed",
                reason=error.reason,
                error=detail,
                not_logged_before=left_out,
                **exchange.log_fields,
            )
        await _redirect(exchange, f"/?sign_in_failed={error.reason}", self._flow_cookie("", 0))

    def _flow_cookie(self, value: str, max_age_s: float) -> tuple[bytes, bytes]:
        # Lax: the issuer's redirect comes from another site, and a Strict cookie would not be sent then.
        header = set_cookie(self._name, value, max_age_s=max_age_s, is_secure=self._access.is_secure, same_site="Lax")
        return b"set-cookie", header


def _query(exchange: Exchange) -> Mapping[str, str]:
    """Return the parameters of the query, each of which must occur once. Raises Refused."""
    raw = exchange.scope.get("query_string", b"")
    if len(raw) > MAX_QUERY_BYTES:
        raise Refused(414, "query_too_long", f"the query is longer than {MAX_QUERY_BYTES} bytes")
    try:
        pairs = urllib.parse.parse_qsl(raw.decode("latin-1"), keep_blank_values=True, max_num_fields=50)
    except ValueError:
        raise Refused(400, "invalid_query", "the query has too many parameters") from None
    values = dict(pairs)
    if len(values) != len(pairs):
        raise Refused(400, "invalid_query", "a parameter of the query occurs twice")
    return values


async def _redirect(exchange: Exchange, url: str, *headers: tuple[bytes, bytes]) -> None:
    location = (b"location", url.encode("ascii", "ignore"))
    await exchange.start(
        303, [location, NO_STORE, (b"referrer-policy", b"no-referrer"), (b"content-length", b"0"), *headers]
    )
    await exchange.send({"type": "http.response.body", "body": b"", "more_body": False})
