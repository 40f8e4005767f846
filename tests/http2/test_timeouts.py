"""Stalled connections are closed: connections without a call, with an incomplete frame or header block, or without
replies to pings."""

from __future__ import annotations

import asyncio

import grpc.aio
import pytest
from h2.events import ConnectionTerminated, StreamReset
from hyperframe.frame import ContinuationFrame, DataFrame, HeadersFrame

from cluster import http2
from cluster.http2.limits import UNREAD_STEP
from cluster.http2.response import MOST_AT_ONCE
from tests.http2.conftest import Serve
from tests.http2.raw import Raw, raw_client
from tests.http2.test_server import unary_stream, unary_unary
from tests.support.cluster import until

pytestmark = pytest.mark.slow


async def ended(raw: Raw, within_s: float = 60.0) -> None:
    """Read until the server has closed the connection."""
    async with asyncio.timeout(within_s):
        try:
            while not raw.eof:
                await raw.receive()
        except ConnectionError:
            pass


async def test_a_greeted_connection_without_a_call_is_closed(serve: Serve) -> None:
    """A connection on which no call begins is closed, so that it does not occupy a file descriptor."""
    async with serve(http2.ServerLimits(hello_s=0.2)) as echo, raw_client(echo.port) as raw:
        await ended(raw)
        assert any(isinstance(event, ConnectionTerminated) for event in raw.events), "a GOAWAY comes first"


async def test_idle_after_a_call_is_longer_and_ends_as_well(serve: Serve) -> None:
    """A connection that has had a call may be idle for longer than one without a call, and is then closed too."""
    async with serve(http2.ServerLimits(hello_s=0.2, idle_s=1.0)) as echo, raw_client(echo.port) as raw:
        await raw.until_ended(await raw.call("One", b""))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ended(raw), 0.7)
        await ended(raw)


async def test_no_call_fails_when_a_connection_is_closed_for_idleness(serve: Serve) -> None:
    """A call that is sent while the server closes the idle connection succeeds."""
    async with serve(http2.ServerLimits(idle_s=0.05)) as echo, grpc.aio.insecure_channel(echo.address) as channel:
        method, seen = unary_unary(channel, "One"), set[str]()
        async with asyncio.timeout(60):
            while len(seen) < 3:
                assert await method(b"again") == b"again"
                seen.update(connection.core.peer for connection in echo.server.connections)
                await asyncio.sleep(0.06)


async def test_a_running_call_is_no_idleness(serve: Serve) -> None:
    """A connection with a silent running call does not count as idle."""
    limits = http2.ServerLimits(hello_s=0.1, idle_s=0.1, frame_s=0.1)
    async with serve(limits) as echo, grpc.aio.insecure_channel(echo.address) as channel:
        call = unary_stream(channel, "Many")(b"1x10")
        waiting = unary_unary(channel, "Forever")(b"")
        assert [len(message) async for message in call] == [10]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting), 0.7)
        waiting.cancel()


BLOCK = HeadersFrame(3, b"\x00").serialize()
HALVES = {
    "half a frame": DataFrame(1, b"x" * 100).serialize()[:-50],
    "half a frame's head": DataFrame(1, b"x").serialize()[:5],
    "a header block without end": BLOCK,
    "a header block that goes on": BLOCK + ContinuationFrame(3, b"").serialize(),
}


@pytest.mark.parametrize("half", HALVES)
async def test_what_has_begun_must_go_on(serve: Serve, half: str) -> None:
    """A connection is closed if a frame or header block stays incomplete, even with a call in progress."""
    async with serve(http2.ServerLimits(frame_s=0.2)) as echo, raw_client(echo.port) as raw:
        assert await raw.call("Forever", b"", end=False) == 1
        data = HALVES[half]
        await raw.send(data[:-1])
        await raw.send(data[-1:])
        await ended(raw)
        assert not echo.server.connections


async def test_a_frame_that_dribbles_in_is_cut(serve: Serve) -> None:
    """A connection is closed if a frame stays incomplete, even if single bytes of the frame still arrive."""
    async with serve(http2.ServerLimits(frame_s=0.3)) as echo, raw_client(echo.port) as raw:
        assert await raw.call("Forever", b"", end=False) == 1
        dribble = asyncio.create_task(_dribble(raw))
        await ended(raw)
        dribble.cancel()


async def _dribble(raw: Raw) -> None:
    for byte in DataFrame(1, b"x" * 1000).serialize():
        await raw.send(bytes([byte]))
        await asyncio.sleep(0.05)


async def test_a_client_that_answers_no_ping_is_cut_without_a_call_too(serve: Serve) -> None:
    """The connection of a client that answers no ping is closed before the idle limit, even without calls."""
    async with serve(http2.ServerLimits(ping_s=0.2, ping_answer_s=0.2)) as echo, raw_client(echo.port):
        await until(lambda: bool(echo.server.connections), "the client is there")
        await until(lambda: not echo.server.connections, "it is cut")


@pytest.mark.parametrize(("method", "request_"), [("One", b"x" * 500), ("Many", b"1000x500")])
async def test_an_answer_that_is_not_read_is_reset(serve: Serve, method: str, request_: bytes) -> None:
    """An answer that a client does not read, whole or streamed, is reset after the limit, and its handler ends. Other
    calls of the connection continue."""
    async with serve(http2.ServerLimits(unread_s=0.3)) as echo, raw_client(echo.port, window=100) as raw:
        stream_id = await raw.call(method, request_)
        while stream_id not in [event.stream_id for event in raw.events if isinstance(event, StreamReset)]:
            await raw.receive(acknowledge=False)
        assert echo.seen.written == 0
        assert (await raw.until_ended(await raw.call("One", b"still here")))["grpc-status"] == "0"
        (connection,) = echo.server.connections
        assert not connection.calls.by_stream


async def test_an_answer_that_is_read_slowly_is_not_reset(serve: Serve) -> None:
    """A client that reads an answer slowly, but at least UNREAD_STEP bytes within each limit, gets all of it."""
    async with serve(http2.ServerLimits(unread_s=0.4)) as echo, raw_client(echo.port, window=2 * UNREAD_STEP) as raw:
        stream_id = await raw.call("Many", b"1x%d" % (12 * UNREAD_STEP))
        while len(raw.data.get(stream_id, b"")) < 10 * UNREAD_STEP:
            await raw.receive()
            await asyncio.sleep(0.15)
        assert (await raw.until_ended(stream_id))["grpc-status"] == "0"


async def test_a_client_with_too_many_unread_bytes_loses_its_connection(serve: Serve) -> None:
    """The bytes that a client's windows do not allow are bounded for all its calls together."""
    limits = http2.ServerLimits(max_unsent_bytes=100_000, frame_s=0.2)
    async with serve(limits) as echo, raw_client(echo.port, window=0) as raw:
        for _ in range(11):
            await raw.call("Many", b"1x10000")
        await ended(raw)
        assert not echo.server.connections


async def test_a_client_that_reads_many_large_answers_slowly_keeps_its_connection(serve: Serve) -> None:
    """The bytes that wait for a client may exceed the limit as long as the client reads. However large the client's
    windows are, the socket's buffer holds few of these bytes."""
    limits, size = http2.ServerLimits(max_unsent_bytes=16 * MOST_AT_ONCE, frame_s=0.2), 64 * MOST_AT_ONCE
    async with serve(limits) as echo, raw_client(echo.port, window=2**31 - 1) as raw:
        raw.h2.increment_flow_control_window(2**31 - 1 - 65_535)
        streams = [await raw.call("Many", b"1x%d" % size) for _ in range(2)]
        await until(lambda: len(echo.server.connections) == 1, "the connection is open")
        (connection,) = echo.server.connections
        await until(lambda: connection.core.output.paused, "the socket takes no more bytes")
        assert sum(call.pending_bytes for call in connection.calls.by_stream.values()) > limits.max_unsent_bytes
        while any(len(raw.data.get(stream, b"")) < size for stream in streams):
            await raw.receive()
        for stream in streams:
            assert (await raw.until_ended(stream))["grpc-status"] == "0"
