"""The console of one gateway process: all its endpoints, below `/console` and at `/`."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from cluster.api.outcomes import CallError
from cluster.config.schema import Config
from cluster.gateway.apis.admin.authorization import AdminAuthorizer, AdminMethod
from cluster.gateway.apis.http.body import RequestBodies
from cluster.gateway.apis.http.calls import HttpCalls
from cluster.gateway.apis.http.exchange import Application, Endpoint, Exchange
from cluster.gateway.apis.http.protocol import CONNECTION
from cluster.gateway.apis.openai.app import OpenAiApi
from cluster.gateway.call_service import CallService
from cluster.gateway.console.access.access import ConsoleAccess, Viewer
from cluster.gateway.console.access.sign_in import MAX_BODY_BYTES, OIDC_CALLBACK, OIDC_START, KeySignIn
from cluster.gateway.console.bridge import AdminBridge
from cluster.gateway.console.csp_reports import CspReports
from cluster.gateway.console.errors import FORM, JSON_HEADERS
from cluster.gateway.console.history.long_history import LongHistory
from cluster.gateway.console.pages import CSP_REPORT, page_endpoints, read_files
from cluster.gateway.console.streams import ViewerFeed, ViewerStreams
from cluster.gateway.listeners import ADMIN_MESSAGE_BYTES
from cluster.observe.metrics import Metrics
from cluster.policy.limits.request_bytes import RequestBytes
from cluster.policy.tenants.identity import Principal, is_allowed

if TYPE_CHECKING:
    from cluster.gateway.auth.tenants import TenantAuthenticator
    from cluster.gateway.console.access.oidc_sign_in import OidcSignIn

PREFIX = "/console"
CALL_PATHS = ("/v1/models", "/v1/chat/completions")
"""Paths of the OpenAI API that the console also serves below PREFIX, for the playground."""
API_LABEL = "console"
MAX_REPORT_BYTES = 16_384


@dataclass(frozen=True, slots=True)
class ConsoleParts:
    """The parts of a gateway process that the console uses. `feed`: the source of live data; None without live data."""

    config: Config
    tenants: TenantAuthenticator | None
    service: CallService
    methods: Mapping[str, AdminMethod]
    authorizer: AdminAuthorizer
    request_bytes: RequestBytes
    metrics: Metrics
    feed: ViewerFeed | None = None

    def bodies(self, limit_bytes: int) -> RequestBodies:
        """Return the reader of request bodies of at most this size."""
        return RequestBodies(limit_bytes, self.request_bytes)


def build_console(parts: ConsoleParts, secrets: Callable[[], Sequence[bytes]]) -> ConsoleApp:
    """Return the console of a gateway process. `secrets`: returns the cluster's secrets. Raises ValueError if a
    configured file cannot be used."""
    access = ConsoleAccess(parts.config.gateway, parts.tenants, secrets)
    keys = KeySignIn(access, parts.tenants, parts.bodies(MAX_BODY_BYTES), parts.authorizer, time.monotonic)
    settings, auth = parts.config.gateway.console, parts.config.auth
    if settings.oidc is None or parts.tenants is None or auth is None:
        return ConsoleApp(parts, access, keys)
    from cluster.gateway.auth.oidc import Issuer
    from cluster.gateway.console.access.oidc_flow import OidcFlow
    from cluster.gateway.console.access.oidc_sign_in import OidcSignIn

    (issuer,) = (entry for entry in auth.oidc if entry.issuer == settings.oidc.issuer)  # the configuration is checked
    claims = issuer.tenant_claim, issuer.role_claim, frozenset(issuer.algorithms)
    flow = OidcFlow(settings.oidc, Issuer(issuer.issuer, settings.oidc.client_id, *claims), settings.public_url)
    return ConsoleApp(parts, access, keys, OidcSignIn(flow, access, parts.tenants, keys, secrets))


class ConsoleApp:
    """The endpoints of the console."""

    def __init__(
        self, parts: ConsoleParts, access: ConsoleAccess, keys: KeySignIn, oidc: OidcSignIn | None = None
    ) -> None:
        """`oidc`: the sign-in with an OpenID issuer; None without one."""
        service = parts.service
        self._config = parts.config
        self._access = access
        self._keys = keys
        self._oidc = oidc
        self._calls = HttpCalls(service, parts.bodies(parts.config.gateway.max_message_bytes), API_LABEL)
        self._bridge = AdminBridge(parts.methods, parts.authorizer, parts.bodies(ADMIN_MESSAGE_BYTES))
        self._reports = CspReports(parts.bodies(MAX_REPORT_BYTES), parts.metrics, service.clock)
        url = parts.config.gateway.console.prometheus_url
        self._long_history = LongHistory(url, parts.config.name) if url else None
        self._streams = None
        if parts.feed is not None:
            self._streams = ViewerStreams(access, parts.feed, service.authenticator.on_change)

    def endpoints(self) -> Mapping[str, Application]:
        """Return the endpoints by path."""
        api = OpenAiApi(self._calls, self._caller).endpoints()
        endpoints: dict[str, Application] = {
            **page_endpoints(read_files()),
            CSP_REPORT: Endpoint(FORM, "POST", self._reports.report),
            "/console/session": Endpoint(FORM, "GET", self._session),
            "/console/sign-in": Endpoint(FORM, "POST", self._keys.sign_in),
            "/console/sign-out": Endpoint(FORM, "POST", self._keys.sign_out),
            **{f"{PREFIX}{path}": api[path] for path in CALL_PATHS},
            **{path: self._signed_in("POST", answer) for path, answer in self._bridge.answers().items()},
        }
        if self._streams is not None:
            endpoints["/console/events"] = self._signed_in("GET", self._streams.events)
            endpoints["/console/history"] = self._signed_in("GET", self._history)
        if self._oidc is not None:
            endpoints[OIDC_START] = Endpoint(FORM, "GET", self._oidc.start)
            endpoints[OIDC_CALLBACK] = Endpoint(FORM, "GET", self._oidc.finish)
        return endpoints

    async def close(self) -> None:
        """End all event streams, because the gateway stops."""
        if self._streams is not None:
            self._streams.close()
        if self._long_history is not None:
            self._long_history.close()
        if self._oidc is not None:
            await self._oidc.flow.close()

    def _signed_in(self, method: str, answer: Callable[[Exchange, Viewer], Awaitable[None]]) -> Endpoint:
        """Return an endpoint for signed-in viewers only."""

        async def answer_viewer(exchange: Exchange) -> None:
            viewer = self._access.viewer(exchange)
            exchange.principal = viewer.principal
            exchange.scope[CONNECTION].mark_authenticated()
            await answer(exchange, viewer)

        return Endpoint(FORM, method, answer_viewer)

    async def _caller(self, exchange: Exchange) -> Principal:
        """Return the principal that is used when a viewer calls a model."""
        return self._access.viewer(exchange).caller

    async def _history(self, exchange: Exchange, viewer: Viewer) -> None:
        """Answer with the history: the last hour from memory, a longer time from Prometheus if one is configured."""
        if self._long_history is not None and self._long_history.covers(exchange):
            await self._long_history.answer(exchange, viewer)
        elif self._streams is not None:
            await self._streams.history(exchange, viewer)

    # ---- the session

    async def _session(self, exchange: Exchange) -> None:
        """Answer a browser's query for its console session. If the configuration has no section `auth`, a browser
        without a session gets a new one."""
        access = self._access
        access.check_site(exchange)
        session, headers = access.session(exchange), list(JSON_HEADERS)
        if not access.has_auth and (session is None or session.by != "nobody"):
            session = access.without_auth()
            headers.append(access.cookie(session))
        viewer = None
        if session is not None:
            try:
                viewer = access.check(session)
            except CallError:
                headers.append(access.cookie(None))
        await exchange.respond(200, orjson.dumps(self._description(viewer)), headers)

    def _description(self, viewer: Viewer | None) -> Mapping[str, Any]:
        """Return the description of a session for the page. The version of the software is empty for a viewer who is
        not signed in."""
        settings, auth = self._config.gateway.console, self._config.auth
        description = {
            "signed_in": viewer is not None,
            "role": "",
            "tenant": "",
            "actor": "",
            "expires_at_s": 0,
            "csrf": "",
            "sign_in": {"key": auth is not None and auth.api_keys is not None, "oidc": self._oidc is not None},
            "auth": self._access.has_auth,
            "may": {"fleet": False, "tenants": False, "keys": False},
            "traces_url": "",
            "prometheus": False,
            "cluster": self._config.name,
            "version": "",
        }
        if viewer is None:
            return description
        from cluster import __version__

        principal, session = viewer.principal, viewer.session
        tenant = principal.tenant.name
        return description | {
            "role": principal.role,
            "tenant": tenant if self._access.has_auth else "",
            "actor": f"{principal.by}:{principal.subject}" if self._access.has_auth else "",
            "expires_at_s": session.expires_at_s,
            "csrf": session.csrf,
            "may": {grant: is_allowed(principal, grant, tenant) for grant in ("fleet", "tenants", "keys")},
            "traces_url": settings.traces_url,
            "prometheus": bool(settings.prometheus_url),
            "version": __version__,
        }
