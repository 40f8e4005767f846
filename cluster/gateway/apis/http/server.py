"""HTTP server that runs uvicorn's protocol on the gateway's own event loop: bind, serve, drain, close.

Of uvicorn only the protocol is used. `uvicorn.Server` is not used because it takes over the signals of the process and
polls ten times a second.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from cluster import http2
from cluster.gateway.apis.http.protocol import HttpProtocol
from cluster.gateway.apis.http.timeouts import TimeoutLimits


class HttpServer:
    """An HTTP server that serves one ASGI application at one address."""

    def __init__(
        self, app: Any, admission: http2.ConnectionAdmission | None = None, timeouts: TimeoutLimits | None = None
    ) -> None:
        """`admission`: the connection limits, which the ports of a process may share."""
        self._admission = admission or http2.ConnectionAdmission()
        self._timeouts = timeouts or TimeoutLimits()
        self._config = uvicorn.Config(
            app,
            http=HttpProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,  # x-forwarded-for is not trusted
        )
        self._state = ServerState()
        self._listener: http2.Listener | None = None

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None = None, *, shared: bool = False) -> int:
        """Bind an address and serve requests. Returns the port. `shared`: whether other processes may bind the port
        too. Raises OSError if the address cannot be bound."""
        self._config.load()
        listener = http2.listening_socket(host, port, shared=shared)
        self._listener = http2.Listener(
            listener, lambda slot: HttpProtocol(self._config, self._state, slot, self._timeouts), self._admission, tls
        )
        self._listener.start()
        return int(listener.getsockname()[1])

    def abort_where(self, condition: Callable[[asyncio.BaseTransport], bool]) -> int:
        """Abort the connections whose transport meets the condition. Returns the number of aborted connections."""
        cut = [connection.transport for connection in self._state.connections if condition(connection.transport)]
        for transport in cut:
            transport.abort()
        return len(cut)

    async def stop(self, drain_s: float) -> None:
        """Stop accepting, wait up to `drain_s` seconds for running requests, then abort the rest."""
        if self._listener is None:
            return
        self._listener.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        if self._state.tasks:
            await asyncio.wait(list(self._state.tasks), timeout=drain_s)
        for connection in list(self._state.connections):
            connection.transport.abort()
        if self._state.tasks:
            await asyncio.wait(list(self._state.tasks))
