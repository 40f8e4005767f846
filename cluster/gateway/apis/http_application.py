"""All APIs of the HTTP port as one ASGI application."""

from __future__ import annotations

from cluster.gateway.apis.http.body import RequestBodies
from cluster.gateway.apis.http.calls import HttpCalls
from cluster.gateway.apis.http.exchange import Application
from cluster.gateway.apis.http.routes import not_found, routed
from cluster.gateway.apis.openai import app as openai
from cluster.gateway.service import CallService


def http_application(service: CallService, bodies: RequestBodies) -> Application:
    """Return the ASGI application with all routes of the HTTP port."""
    calls = HttpCalls(service, bodies)
    return routed(openai.OpenAiApi(calls).endpoints(), not_found(openai.FORM))
