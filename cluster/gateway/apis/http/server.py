"""uvicorn's HTTP protocol on the gateway's own event loop: bound before it is announced, drained, then closed.

`uvicorn.Server` would take the process's signals and poll ten times a second; of it only the protocol is used.
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
    """An ASGI application behind one address."""

    def __init__(
        self, app: Any, admission: http2.ConnectionAdmission | None = None, pace: TimeoutLimits | None = None
    ) -> None:
        """`admission`: the caps of the port, for a process that has several."""
        self._admission = admission or http2.ConnectionAdmission()
        self._pace = pace or TimeoutLimits()
        self._config = uvicorn.Config(
            app,
            http=HttpProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,  # a caller's address is its connection's, whatever x-forwarded-for claims
        )
        self._state = ServerState()
        self._listener: http2.Listener | None = None

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None = None, *, shared: bool = False) -> int:
        """Bind and serve; returns the port. `shared`: other processes may bind it too. Raises OSError."""
        self._config.load()
        listener = http2.listening(host, port, shared=shared)
        self._listener = http2.Listener(listener, self._connection, self._admission, tls)
        self._listener.start()
        return int(listener.getsockname()[1])

    def _connection(self, held: http2.Held) -> HttpProtocol:
        return HttpProtocol(self._config, self._state, held, self._pace)

    def abort_where(self, condition: Callable[[asyncio.BaseTransport], bool]) -> int:
        """Cut the connections for which it holds, with their requests; returns how many."""
        cut = [one.transport for one in self._state.connections if condition(one.transport)]
        for transport in cut:
            transport.abort()
        return len(cut)

    async def stop(self, drain_s: float) -> None:
        """Take no new connection; requests under way get `drain_s` seconds; then their connections are cut."""
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
