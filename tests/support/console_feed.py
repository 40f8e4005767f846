"""Readers of the console's event streams, as a browser reads them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from cluster.gateway.apis.http.exchange import Receive, Scope, Send
from cluster.gateway.apis.http.server import HttpServer
from cluster.gateway.console.feed import FeedEndpoints
from cluster.gateway.console.overview import deltas
from tests.support.cluster import until


class Watcher:
    """Reader of one event stream.

    `document`: the overview with all changes applied; `names`: the names of all events.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.status = 0
        self.document: dict[str, Any] = {}
        self.raw = bytearray()
        self.names: list[str] = []
        self.ended = False

    async def run(self) -> None:
        """Read until the stream ends."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
            self.status = int(head.split(b" ", 2)[1])
            while not self.ended:
                block = await self.reader.readuntil(b"\n\n")
                self.raw += block
                self._apply(block.decode())
        except (asyncio.IncompleteReadError, ConnectionError):
            self.ended = True

    def _apply(self, block: str) -> None:
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line[:5] in ("event", "data:"))
        if "event" not in fields:
            return
        self.names.append(fields["event"])
        data = json.loads(fields["data"])
        if fields["event"] == "state":
            self.document = data
        elif fields["event"] == "delta":
            self.document = deltas.apply(self.document, data)

    def row(self, name: str, key: str) -> dict[str, Any] | None:
        """Return the row with id `key` in the list `name`; None if there is none."""
        return next((row for row in self.document.get(name, ()) if row["id"] == key), None)


@asynccontextmanager
async def console_port(
    feed: FeedEndpoints, tenant: str = "", is_valid: Callable[[], bool] = lambda: True
) -> AsyncIterator[int]:
    """Serve the console's event stream to a viewer of `tenant`. Yields the port."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await feed.events(scope, receive, send, tenant, is_valid)

    server = HttpServer(app)
    port = await server.start("127.0.0.1", 0)
    try:
        yield port
    finally:
        await server.stop(0)


@asynccontextmanager
async def watching(port: int) -> AsyncIterator[Watcher]:
    """Open an event stream and wait for its first document."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 26)
    writer.write(b"GET / HTTP/1.0\r\nhost: test\r\n\r\n")
    watcher = Watcher(reader, writer)
    task = asyncio.create_task(watcher.run())
    try:
        await until(lambda: bool(watcher.document) or watcher.ended, "the console shows something")
        yield watcher
    finally:
        task.cancel()
        writer.close()
        await asyncio.gather(task, writer.wait_closed(), return_exceptions=True)
