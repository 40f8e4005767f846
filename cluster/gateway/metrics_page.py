"""The /metrics page of one process as an ASGI application. A thread renders the page once for all concurrent
scrapes."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from cluster import http2
from cluster.gateway.apis.http.body import Refused
from cluster.gateway.apis.http.host_names import HostNames
from cluster.gateway.apis.http.server import HttpServer
from cluster.observe.metrics import OPEN_METRICS, Metrics
from cluster.process.descriptors import raise_descriptor_limit

Scope = MutableMapping[str, Any]
GZIP_LEVEL = 1
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class MetricsPage:
    """ASGI application that serves the metrics page."""

    def __init__(self, metrics: Metrics, names: HostNames | None = None) -> None:
        """`names`: the names at which the page is served; None for any."""
        self._metrics = metrics
        self._names = names
        self._making: dict[tuple[str, bool], asyncio.Task[tuple[str, bytes]]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request, with the arguments that ASGI defines."""
        if scope["method"] not in ("GET", "HEAD"):
            await _answer(send, 405, [(b"allow", b"GET, HEAD")], b"")
            return
        if self._names is not None:
            try:
                self._names.check(scope["headers"])
            except Refused as refused:
                text = (b"content-type", b"text/plain; charset=utf-8")
                await _answer(send, refused.status, [text], str(refused).encode())
                return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        accept = OPEN_METRICS if OPEN_METRICS in headers.get(b"accept", "") else ""
        zipped = "gzip" in headers.get(b"accept-encoding", "")
        kind, content = await self._page(accept, zipped)
        encoding = [(b"content-encoding", b"gzip")] if zipped else []
        await _answer(send, 200, [(b"content-type", kind.encode()), *encoding], content)

    async def _page(self, accept: str, zipped: bool) -> tuple[str, bytes]:
        """Return the content type and the page. Scrapes that arrive while a page is being rendered share that page."""
        key = accept, zipped
        making = self._making.get(key)
        if making is None:
            making = self._making[key] = asyncio.create_task(asyncio.to_thread(self._make, accept, zipped))
            making.add_done_callback(lambda _: self._making.pop(key))
        return await asyncio.shield(making)

    def _make(self, accept: str, zipped: bool) -> tuple[str, bytes]:
        kind, content = self._metrics.render(accept)
        return kind, gzip.compress(content, GZIP_LEVEL) if zipped else content


@asynccontextmanager
async def metrics_served(metrics: Metrics, host: str, port: int) -> AsyncIterator[int]:
    """Serve the metrics page on a separate port, for a process that has no other server. Yields the bound port. Raises
    OSError if the port cannot be bound."""
    table = http2.ConnectionTable.for_descriptors(raise_descriptor_limit())
    server = HttpServer(MetricsPage(metrics), http2.ConnectionAdmission(table.pools[http2.Port.METRICS]))
    bound = await server.start(host, port)
    try:
        yield bound
    finally:
        await server.stop(0)


async def _answer(send: Send, status: int, headers: list[tuple[bytes, bytes]], content: bytes) -> None:
    length = (b"content-length", b"%d" % len(content))
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": content, "more_body": False})
