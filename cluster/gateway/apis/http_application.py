"""All APIs of the HTTP port as one ASGI application."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.gateway.apis.anthropic import app as anthropic
from cluster.gateway.apis.anthropic.errors import FORM as ANTHROPIC_FORM
from cluster.gateway.apis.http.body import RequestBodies
from cluster.gateway.apis.http.calls import HttpCalls
from cluster.gateway.apis.http.exchange import Application
from cluster.gateway.apis.http.host_names import HostNames, at_own_hosts
from cluster.gateway.apis.http.routes import not_found, routed
from cluster.gateway.apis.openai import app as openai
from cluster.gateway.call_service import CallService


def http_application(
    service: CallService,
    bodies: RequestBodies,
    more: Mapping[str, Application] | None = None,
    names: HostNames | None = None,
) -> Application:
    """Return the ASGI application with all routes of the HTTP port. Some paths belong to two APIs; for these paths, the
    header with the API version decides which API answers. `more`: further endpoints by path, such as those of the
    console. `names`: the names at which the port answers; None for any."""
    calls = HttpCalls(service, bodies)
    endpoints = {**openai.OpenAiApi(calls).endpoints(), **(more or {})}
    for path, endpoint in anthropic.AnthropicApi(calls).endpoints().items():
        other = endpoints.get(path)
        endpoints[path] = endpoint if other is None else anthropic.ByVersion(endpoint, other)
    missing = anthropic.ByVersion(not_found(ANTHROPIC_FORM), not_found(openai.FORM))
    app = routed(endpoints, missing)
    return app if names is None else at_own_hosts(app, names, openai.FORM)
