"""An echo server on a free port, with one method of each kind. The messages are plain bytes."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest

from cluster import http2
from cluster.http2.limits import Budget
from cluster.http2.server import Gate

SERVICE = "test.Echo"


@dataclass
class Seen:
    """Events that the handlers recorded: metadata, starts, cancellations and writes."""

    metadata: list[tuple[str, str | bytes]] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    running: int = 0
    written: int = 0


@dataclass
class Echo:
    """A running echo server."""

    server: http2.Server
    port: int
    seen: Seen

    @property
    def address(self) -> str:
        """The server's address, as `host:port`."""
        return f"127.0.0.1:{self.port}"


class _Methods:
    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    async def one(self, request: bytes, context: Any) -> bytes:
        self.seen.metadata = list(context.invocation_metadata())
        if request == b"abort":
            await context.abort(
                grpc.StatusCode.NOT_FOUND, "no, ünterwegs 100 %\n", (("why", "because"), ("raw-bin", b"\x00\xff"))
            )
        if request == b"raise":
            raise RuntimeError("secret")
        context.set_trailing_metadata((("x-end", "yes"),))
        await context.send_initial_metadata((("x-begin", "yes"),))
        return request

    async def forever(self, request: bytes, context: Any) -> bytes:
        self.seen.running += 1
        self.seen.started.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.seen.running -= 1
            self.seen.cancelled.set()
        return b""

    async def many(self, request: bytes, context: Any) -> None:
        """Send `count` messages of `size` bytes; the request is the text `{count}x{size}`. Each byte of message number
        n has the value n modulo 251."""
        count, size = map(int, request.split(b"x"))
        for i in range(count):
            await context.write(bytes([i % 251]) * size)
            self.seen.written += 1

    async def back(self, messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for message in messages:
            yield message

    async def slow_reader(self, messages: AsyncIterator[bytes], context: Any) -> bytes:
        await context.read()
        await asyncio.Event().wait()
        return b""


@asynccontextmanager
async def _serve(
    limits: http2.ServerLimits | None = None,
    tls: ssl.SSLContext | None = None,
    admission: http2.ConnectionAdmission | None = None,
    gate: Gate | None = None,
    budget: Budget | None = None,
) -> AsyncIterator[Echo]:
    server, seen = http2.Server(limits, admission, gate, budget), Seen()
    methods = _Methods(seen)
    handlers: dict[str, Any] = {
        "One": grpc.unary_unary_rpc_method_handler(methods.one),
        "Forever": grpc.unary_unary_rpc_method_handler(methods.forever),
        "Many": grpc.unary_stream_rpc_method_handler(methods.many),
        "Back": grpc.stream_stream_rpc_method_handler(methods.back),
        "SlowReader": grpc.stream_unary_rpc_method_handler(methods.slow_reader),
    }
    handlers = {name: _as_bytes(handler) for name, handler in handlers.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = await server.start("127.0.0.1", 0, tls)
    try:
        yield Echo(server, port, seen)
    finally:
        await server.stop(0)


def _as_bytes(handler: Any) -> Any:
    """Return the handler without serializers, so that it receives and returns bytes."""
    return handler._replace(request_deserializer=bytes, response_serializer=bytes)


Serve = Callable[..., AbstractAsyncContextManager[Echo]]


@pytest.fixture
def serve() -> Serve:
    """Return a function that starts a server: `async with serve(limits, tls) as echo`."""
    return _serve
