"""The routes of the HTTP port as one ASGI application."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.routing import Route, Router

from cluster.gateway.apis.http.body import Refused
from cluster.gateway.apis.http.exchange import ApiForm, Application, Exchange, Receive, Scope, Send
from cluster.gateway.apis.http.protocol import CONNECTION


def routed(endpoints: Mapping[str, Application], not_found: Application) -> Application:
    """Return the ASGI application that serves the endpoints. `endpoints`: keyed by path. `not_found`: the application
    that answers all other paths."""
    routes = [Route(path, endpoint, name=path) for path, endpoint in endpoints.items() if "{" in path]
    router = Router(routes, redirect_slashes=False, default=not_found)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        """Look up the path in `endpoints`, then in the router. The router holds only the paths with parameters, because
        it tries its regular expressions one after the other."""
        endpoint = endpoints.get(scope.get("path", "")) if scope["type"] == "http" else None
        await (endpoint or router)(scope, receive, send)

    return app


HINT = "base URLs are http://HOST:PORT/v1 for OpenAI's clients, http://HOST:PORT for Anthropic's"


def not_found(form: ApiForm) -> Application:
    """Return the ASGI application that answers requests for unknown paths with 404."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # a WebSocket: closed before it is accepted
            await send({"type": "websocket.close", "code": 1000})
            return
        scope[CONNECTION].charge_refusal()
        refused = Refused(404, "not_found", f"there is nothing at {scope['path']}; {HINT}")
        await Exchange(form, scope, receive, send).refuse(refused)

    return app
