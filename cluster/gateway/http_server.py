"""uvicorn's HTTP protocol on the gateway's own event loop: bound before it is announced, drained, then closed.

`uvicorn.Server` would take the process's signals and poll ten times a second; of it only the protocol is used.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from cluster.gateway.http_pace import PaceLimits
from cluster.gateway.http_protocol import HttpProtocol


class HttpServer:
    """An ASGI application behind one address."""

    def __init__(self, app: Any, pace: PaceLimits | None = None) -> None:
        self._pace = pace or PaceLimits()
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
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None = None, *, shared: bool = False) -> int:
        """Bind and serve; returns the port. `shared`: other processes may bind it too. Raises OSError."""
        self._config.load()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=self._config.backlog, reuse_port=shared)
        # asyncio sets it only for sockets made with proto=IPPROTO_TCP; without it a second call's tokens wait for ACKs.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: HttpProtocol(self._config, self._state, loop, self._pace),
            sock=listener,
            backlog=self._config.backlog,
            ssl=tls,
        )
        return int(listener.getsockname()[1])

    async def stop(self, drain_s: float) -> None:
        """Take no new connection; requests under way get `drain_s` seconds; then their connections are cut."""
        if self._server is None:
            return
        self._server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        if self._state.tasks:
            await asyncio.wait(list(self._state.tasks), timeout=drain_s)
        for connection in list(self._state.connections):
            connection.transport.abort()
        if self._state.tasks:
            await asyncio.wait(list(self._state.tasks))
