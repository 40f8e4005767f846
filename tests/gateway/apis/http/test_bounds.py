"""Bounds on the bytes and the time of an HTTP client, tested over a real socket with a minimal application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.gateway.apis.http.connection import UNPROVEN_REFUSALS
from cluster.gateway.apis.http.protocol import CONNECTION, MAX_HEADERS
from cluster.gateway.apis.http.server import HttpServer
from cluster.gateway.apis.http.timeouts import TimeoutLimits
from tests.gateway.apis.http.raw import read_all
from tests.support.loop_clock import HANG_S, LoopClock, within

QUICK = TimeoutLimits(
    check_s=0.05,
    first_head_s=0.2,
    head_s=0.2,
    keep_alive_s=0.6,
    min_body_bytes_per_s=4096,
    leftover_s=0.2,
    unread_s=0.3,
)
END_S = 5.0
"""Seconds of the event loop within which the server must close a connection that exceeds a bound."""
Handle = Callable[[dict[str, Any], Any, Any], Awaitable[None]]


@dataclass
class Echo:
    """An ASGI application that records the scope of each request and answers with the length of the body."""

    seen: list[dict[str, Any]] = field(default_factory=list)
    port: int = 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Handle a request."""
        self.seen.append(scope)
        size, more = 0, scope["path"] != "/refuse"
        if scope["path"] == "/charged":
            scope[CONNECTION].charge_refusal()
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size += len(message["body"])
            more = message["more_body"]
        content = b"x" * 50_000_000 if scope["path"] == "/large" else str(size).encode()
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(content))]}
        )
        await send({"type": "http.response.body", "body": content, "more_body": False})


@asynccontextmanager
async def echo(timeouts: TimeoutLimits | None = None) -> AsyncIterator[Echo]:
    """Serve an Echo application on loopback."""
    app = Echo()
    server = HttpServer(app, timeouts=timeouts)
    app.port = await server.start("127.0.0.1", 0)
    try:
        yield app
    finally:
        await server.stop(0)


async def exchange(app: Echo, data: bytes) -> bytes:
    """Send bytes, and return everything that is received until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
    try:
        writer.write(data)
        return await within(END_S, read_all(reader))
    finally:
        writer.close()


async def dribble(app: Echo, data: bytes, byte: bytes) -> bytes:
    """Send `data`, then `byte` repeatedly until the server closes the connection. Returns the server's answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
    reading = asyncio.create_task(read_all(reader))
    try:
        writer.write(data)
        async with asyncio.timeout(HANG_S), LoopClock() as clock:
            while not reading.done():
                writer.write(byte)
                await asyncio.wait((reading,), timeout=0.02)
        assert clock.now_s <= END_S
        return reading.result()
    finally:
        reading.cancel()
        writer.close()


async def test_trailers_are_no_headers() -> None:
    """Trailers of a request are dropped, since a proxy that checks headers would not see an `authorization` after the
    body."""
    body = b"POST /a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n2\r\nab\r\n0\r\n"
    async with echo() as app:
        answer = await exchange(app, body + b"authorization: Bearer x\r\nhost: b\r\ncontent-type: a/b\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert [name for name, _ in app.seen[0]["headers"]] == [b"host", b"transfer-encoding", b"connection"]


@pytest.mark.parametrize(
    "head",
    [
        b"GET /a HTTP/1.1\r\n\r\n",
        b"GET /a HTTP/1.0\r\n\r\n",
        b"GET /a HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\n",
        b"GET /a HTTP/1.1\r\nhost: a\r\nx: y\r\nHOST: b\r\n\r\n",
        b"GET /a HTTP/1.1\r\nhost: a b\r\n\r\n",
        b"GET /a HTTP/2.0\r\nhost: a\r\n\r\n",
        b"GET /a HTTP/0.9\r\nhost: a\r\n\r\n",
        b"GET /a HTTP/3.0\r\nhost: a\r\n\r\n",
        b"GET /a HTTP/1.2\r\nhost: a\r\n\r\n",
        b"GET /a\r\n\r\n",
        b"GET /a HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * MAX_HEADERS + b"\r\n",
    ],
)
async def test_a_head_that_is_wrong_reaches_no_handler(head: bytes) -> None:
    """An ambiguous request head is refused, since two parsers could read different requests from the same head."""
    async with echo() as app:
        answer = await exchange(app, head)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert app.seen == []


async def test_the_callers_address_is_its_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address of a caller is the address of the connection, not an address from a header."""
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    async with echo() as app:
        await exchange(
            app, b"GET /a HTTP/1.0\r\nhost: a\r\nx-forwarded-for: 6.6.6.6\r\nx-forwarded-proto: https\r\n\r\n"
        )
    assert app.seen[0]["client"][0] == "127.0.0.1"
    assert app.seen[0]["scheme"] == "http"


async def test_a_refusal_waits_for_the_answers_before_it() -> None:
    """The refusal of a request is sent after the whole earlier answer, never within it."""
    good = b"GET /large HTTP/1.1\r\nhost: a\r\n\r\n"
    async with echo() as app:
        answer = await exchange(app, good + b"GET /a HTTP/1.1\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert body == b"x" * 50_000_000


async def test_thousands_of_pipelined_requests_are_answered_in_order_and_held_as_bytes() -> None:
    """Thousands of pipelined requests are answered in order. Requests that wait are held as bytes, not as tasks."""
    count = 3000
    requests = b"".join(b"POST /%d HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nab" % i for i in range(count - 1))
    held = 0
    async with echo() as app:
        reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
        writer.write(requests + b"GET /last HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        reading = asyncio.create_task(reader.read())
        while not reading.done():
            held = max(held, sum("RequestResponseCycle" in repr(task) for task in asyncio.all_tasks()))
            await asyncio.wait((reading,), timeout=0.001)
        writer.close()
    assert reading.result().count(b"HTTP/1.1 200 ") == count
    assert [scope["path"] for scope in app.seen] == [*(f"/{i}" for i in range(count - 1)), "/last"]
    assert held <= 2


@pytest.mark.parametrize("chunked", [False, True])
async def test_pipelined_bodies_of_any_length_are_kept_apart(chunked: bool) -> None:
    """Pipelined bodies each end at the right byte, whether they are shorter or longer than the pieces that are parsed
    at once."""
    sizes = [0, 1, 16_384, 16_385, 100_000, 1 << 18, 3, (1 << 18) + 1, 700_000, 2]

    def request(i: int, size: int) -> bytes:
        head = b"POST /%d HTTP/1.1\r\nhost: a\r\n" % i
        if not chunked:
            return head + b"content-length: %d\r\n\r\n" % size + b"x" * size
        chunks = b"".join(b"1\r\nx\r\n" for _ in range(size % 1000)) + b"%x\r\n" % (size // 1000 * 1000 or 1)
        return (
            head + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"x" * (size // 1000 * 1000 or 1) + b"\r\n0\r\n\r\n"
        )

    sent = b"".join(request(i, size) for i, size in enumerate(sizes))
    async with echo() as app:
        answer = await exchange(app, sent + b"GET /last HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    got = [int(part.partition(b"HTTP/1.1")[0]) for part in answer.split(b"\r\n\r\n")[1:]]
    lengths = [size % 1000 + (size // 1000 * 1000 or 1) for size in sizes] if chunked else sizes
    assert got == [*lengths, 0]


async def test_a_stranger_with_many_refused_requests_loses_the_connection() -> None:
    """An unauthenticated client with many refused requests is disconnected, since each check of a credential takes
    time."""
    async with echo() as app:
        answer = await exchange(app, b"GET /charged HTTP/1.1\r\nhost: a\r\n\r\n" * 2000)
    assert UNPROVEN_REFUSALS <= answer.count(b"HTTP/1.1 200 ") < 2 * UNPROVEN_REFUSALS
    assert answer.count(b"connection: close") == 1


@pytest.mark.parametrize(
    ("data", "byte"),
    [(b"", b""), (b"GET / HT", b""), (b"", b"\r\n"), (b"GET / HTTP/1.1\r\nhost: a\r\nx: ", b"y"), (b"GET /", b"a")],
    ids=["silent", "half a head", "empty lines", "dribbled header", "dribbled path"],
)
async def test_a_head_that_does_not_end_ends_its_connection(data: bytes, byte: bytes) -> None:
    """A connection is closed if a request head does not end in time."""
    async with echo(QUICK) as app:
        await dribble(app, data, byte)
        again = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n" + data
        answer = await dribble(app, again, byte)
    assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_dribbled_body_ends_its_connection(chunked: bool) -> None:
    """A connection is closed with 408 if a request body arrives too slowly."""
    how = b"transfer-encoding: chunked" if chunked else b"content-length: 1000000"
    async with echo(QUICK) as app:
        answer = await dribble(
            app, b"POST /a HTTP/1.1\r\nhost: a\r\n" + how + b"\r\n\r\n", b"1\r\nx\r\n" if chunked else b"x"
        )
    assert answer.startswith(b"HTTP/1.1 408 ")


async def test_the_rest_of_a_refused_body_is_not_read_for_ever() -> None:
    """After a request is answered, the rest of the request's body is read for a limited time only."""
    async with echo(QUICK) as app:
        answer = await dribble(
            app, b"POST /refuse HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999\r\n\r\n", b"x" * 1000
        )
    assert answer.startswith(b"HTTP/1.1 200 ")


async def test_a_response_that_is_not_read_ends_its_connection() -> None:
    """A connection is closed if the client does not read a response."""
    async with echo(QUICK) as app:
        reader, writer = await asyncio.open_connection("127.0.0.1", app.port, limit=1024)
        writer.write(b"GET /large HTTP/1.1\r\nhost: a\r\n\r\n")
        await reader.readexactly(4)
        with pytest.raises(ConnectionError):
            await within(END_S, write_on(writer))
        writer.close()


async def write_on(writer: asyncio.StreamWriter) -> None:
    """Write without reading, until a write fails."""
    while True:
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.02)


async def test_what_strangers_send_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Invalid requests of unauthenticated clients are not logged, since the log could fill the disk."""
    caplog.set_level(logging.DEBUG)
    async with echo() as app:
        for data in (
            b"\x00\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
        ):
            await exchange(app, data)
    assert [record for record in caplog.records if record.name.startswith("uvicorn")] == []
