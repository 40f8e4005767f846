"""uvicorn's HTTP protocol on the gateway's own event loop: bound before it is announced, drained, then closed.

`uvicorn.Server` would take the process's signals and poll ten times a second; of it only the protocol is used.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from cluster.gateway.http_face import CONNECTION

KEEP_ALIVE_S = 75
"""Longer than clients keep an idle connection in their pools, so that they never write to one that is closing."""
MAX_HEAD_BYTES = 65_536


class _Protocol(HttpToolsProtocol):
    """Bounds what comes before a body, which the parser does not, and is its requests' `Connection`."""

    full = False
    """Whether the client must read before more is written. Asked for each token, hence no property."""
    _gone = False
    _watcher: Callable[[], None] | None = None
    _head_bytes = 0
    _in_head = True

    def send(self, data: bytes) -> None:
        """Send one chunk of a body whose head has announced chunks, as every head without a length does."""
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def drained(self) -> None:
        """Wait until it is full no longer, or closed."""
        await self.flow.drain()

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self.full = True

    def resume_writing(self) -> None:
        """It reads again."""
        self.full = False
        super().resume_writing()

    def watch(self, lost: Callable[[], None]) -> None:
        """Call this once the client is gone, or soon where it is gone already."""
        self._watcher = lost
        self.flow.resume_reading()  # a long body has paused it, and the client's end is read too
        if self._gone:
            self.loop.call_soon(lost)

    def unwatch(self, lost: Callable[[], None]) -> None:
        """No longer."""
        if self._watcher is lost:
            self._watcher = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Its request has nobody to answer any more."""
        self.full = False
        super().connection_lost(exc)
        self._gone = True
        if self._watcher is not None:
            self._watcher()

    def data_received(self, data: bytes) -> None:
        """The parser neither bounds a head nor tells of a part of one: what comes without ending it is counted."""
        self._in_head = True
        super().data_received(data)
        self._head_bytes = self._head_bytes + len(data) if self._in_head else 0
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The request's head is larger than {MAX_HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()
        cast(dict[str, Any], self.scope)[CONNECTION] = self

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._in_head = False
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head = False
        super().on_message_complete()


class HttpServer:
    """An ASGI application behind one address."""

    def __init__(self, app: Any) -> None:
        self._config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
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
            lambda: _Protocol(self._config, self._state, {}, loop),
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
