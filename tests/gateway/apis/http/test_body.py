"""Unfinished request bodies over HTTP: all bodies together stay within the budget, and each body can be completed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from cluster.gateway.apis.http.body import Refused, RequestBodies
from cluster.gateway.apis.http.protocol import CONNECTION
from cluster.gateway.apis.http.server import HttpServer
from cluster.policy.limits.request_bytes import ByteBounds, RequestBytes
from tests.gateway.apis.http.raw import read_all
from tests.support.cluster import until

MIB = 1 << 20
LIMIT = 4 * MIB
WAIT_S = 60.0


@dataclass
class Sink:
    """An ASGI application that reads request bodies and answers each with the length of the body. The budget allows two
    bodies of the largest size."""

    budget: RequestBytes = field(
        default_factory=lambda: RequestBytes(ByteBounds(2 * LIMIT, 2 * LIMIT, 3 * LIMIT), time.monotonic)
    )
    port: int = 0
    parsing: asyncio.Event = field(default_factory=asyncio.Event)
    running: int = 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Handle a request. The path of the request names the tenant."""
        declared = dict(scope["headers"]).get(b"content-length", b"")
        bodies, status = RequestBodies(LIMIT, self.budget), 200
        self.running += 1
        try:
            async with bodies.read(receive, scope[CONNECTION], declared, scope["path"]) as content:
                answer = str(len(content)).encode()
                await self.parsing.wait()
        except Refused as refused:
            status, answer = refused.status, refused.code.encode()
        except ConnectionResetError:
            return
        finally:
            self.running -= 1
        await send(
            {"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(answer))]}
        )
        await send({"type": "http.response.body", "body": answer, "more_body": False})


@asynccontextmanager
async def sink() -> AsyncIterator[Sink]:
    """Serve the application on loopback. Each body counts as parsed as soon as it is read."""
    app = Sink()
    app.parsing.set()
    server = HttpServer(app)
    app.port = await server.start("127.0.0.1", 0)
    try:
        yield app
    finally:
        await server.stop(0)


class Upload:
    """A request whose body of `size` bytes is being sent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int, chunked: bool) -> None:
        self.reader, self.writer, self.size, self.chunked = reader, writer, size, chunked
        self.sent = 0

    @classmethod
    async def begin(cls, app: Sink, tenant: str, size: int, *, chunked: bool = False) -> Upload:
        """Connect and send the head of the request."""
        upload = cls(*await asyncio.open_connection("127.0.0.1", app.port), size, chunked)
        how = "transfer-encoding: chunked" if chunked else f"content-length: {size}"
        upload.writer.write(f"POST /{tenant} HTTP/1.1\r\nhost: a\r\n{how}\r\nconnection: close\r\n\r\n".encode())
        return upload

    def send(self, size: int) -> None:
        """Send up to `size` bytes of the body, as many as the socket accepts."""
        self.sent += size
        data = b" " * size
        self.writer.write(b"%x\r\n%b\r\n" % (size, data) if self.chunked else data)

    async def finish(self) -> bytes:
        """Send the rest of the body, and return the answer."""
        self.send(self.size - self.sent)
        if self.chunked:
            self.writer.write(b"0\r\n\r\n")
        return await self.answer()

    async def answer(self) -> bytes:
        """Read the answer, and return the status and the content."""
        answer = await asyncio.wait_for(read_all(self.reader), WAIT_S)
        head, _, content = answer.partition(b"\r\n\r\n")
        return head.split(b" ")[1] + b" " + content

    def abort(self) -> None:
        """Abort the connection."""
        self.writer.transport.abort()


async def test_unfinished_bodies_of_a_tenant_hold_its_budget_and_each_can_be_completed() -> None:
    """The unfinished bodies of a tenant hold no more than the budget. Each body can be completed, since a reservation
    is granted for the whole body."""
    async with sink() as app:
        uploads = [await Upload.begin(app, "t", LIMIT, chunked=i % 2 == 0) for i in range(8)]
        for upload in uploads:
            upload.send(LIMIT - 1)
        await until(lambda: app.budget.waiting == 6, "two bodies are granted, the others wait")
        assert app.budget.held == 2 * LIMIT
        other = await Upload.begin(app, "other", LIMIT)
        assert await other.finish() == b"200 %d" % LIMIT, "another tenant has a budget of its own"
        assert sorted(await asyncio.gather(*(upload.finish() for upload in uploads))) == [b"200 %d" % LIMIT] * 8
        assert (app.budget.held, app.budget.waiting) == (0, 0)


async def test_a_body_counts_until_it_is_parsed() -> None:
    """A body counts against the budget until it is parsed."""
    async with sink() as app:
        app.parsing.clear()
        uploads = [await Upload.begin(app, "t", LIMIT) for _ in range(3)]
        answers = [asyncio.create_task(upload.finish()) for upload in uploads]
        await until(lambda: app.budget.held == 2 * LIMIT and app.budget.waiting == 1, "two are received, one waits")
        app.parsing.set()
        assert await asyncio.gather(*answers) == [b"200 %d" % LIMIT] * 3


async def test_a_small_body_needs_no_budget() -> None:
    """A small body is read while large bodies of the same tenant hold the whole budget."""
    async with sink() as app:
        large = [await Upload.begin(app, "t", LIMIT) for _ in range(4)]
        for upload in large:
            upload.send(MIB)
        await until(lambda: app.budget.waiting == 2, "two wait")
        assert await (await Upload.begin(app, "t", 1000)).finish() == b"200 1000"
        for upload in large:
            upload.abort()
        await until(lambda: not app.running, "all bodies have ended")
        assert (app.budget.held, app.budget.waiting) == (0, 0), "aborted uploads release their reservations"


async def test_a_body_that_stalls_while_others_wait_is_ended() -> None:
    """A body that stalls is refused with 408 while another body of the same tenant waits."""
    async with sink() as app:
        stalled = [await Upload.begin(app, "t", LIMIT) for _ in range(2)]
        for upload in stalled:
            upload.send(MIB)
        await until(lambda: app.budget.held == 2 * LIMIT, "both are granted")
        waiting = await Upload.begin(app, "t", LIMIT)
        answer = asyncio.create_task(waiting.finish())
        await until(lambda: app.budget.waiting == 1, "a third waits")
        for reservation in list(app.budget._granted):
            reservation.too_slow()
        answers = await asyncio.gather(*(upload.answer() for upload in stalled))
        assert [content[:3] for content in answers] == [b"408"] * 2
        assert await answer == b"200 %d" % LIMIT


async def test_too_large_bodies_are_refused() -> None:
    """A body over the limit is refused before all of it is in memory."""
    async with sink() as app:
        declared = await Upload.begin(app, "t", LIMIT + 1)
        assert await declared.answer() == b"413 request_too_large"
        chunked = await Upload.begin(app, "t", LIMIT + MIB, chunked=True)
        chunked.send(LIMIT + 1)
        assert await chunked.answer() == b"413 request_too_large"
        assert app.budget.held == 0
