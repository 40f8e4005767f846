"""A flood of empty frames closes the connection, unless enough bytes were sent to the client to justify the frames."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress

import pytest
from h2.errors import ErrorCodes
from h2.events import DataReceived
from h2.exceptions import ProtocolError, StreamClosedError
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from cluster import http2
from tests.http2.conftest import Serve
from tests.http2.raw import Raw, raw_client

pytestmark = pytest.mark.slow

LIMITS = http2.ServerLimits(resets_burst=50, resets_per_s=1)
UNKNOWN = b"\x00\x00\x04\x77\x00\x00\x00\x00\x00abcd"


def acknowledged(frame: Frame) -> bytes:
    """Serialize a frame with the flag ACK."""
    frame.flags.add("ACK")
    return frame.serialize()


def nothing(raw: Raw) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the bytes of each kind of empty frame. Stream 1 has a running call, stream 3 an ended call."""
    yield "data", DataFrame(1).serialize()
    yield "data on a closed stream", DataFrame(3, b"x").serialize()
    yield "window update", WindowUpdateFrame(0, 1).serialize()
    yield "window update of a stream", WindowUpdateFrame(1, 1).serialize()
    yield "window update of a closed stream", WindowUpdateFrame(3, 1).serialize()
    yield "priority", PriorityFrame(1, depends_on=5).serialize()
    yield "unknown", UNKNOWN
    yield "alternative service", b"\x00\x00\x02\x0a\x00\x00\x00\x00\x01\x00\x00"
    yield "ping", PingFrame(0, b"12345678").serialize()
    yield "ping acknowledged", acknowledged(PingFrame(0, b"12345678"))
    yield "settings", SettingsFrame(0).serialize()
    yield "settings acknowledged", acknowledged(SettingsFrame(0))
    yield "reset of a closed stream", RstStreamFrame(3).serialize()
    yield "one byte of data", DataFrame(1, b"\x00").serialize()


KINDS = [name for name, _ in nothing(None)]  # type: ignore[arg-type]


async def settled(raw: Raw) -> None:
    """Start a call on stream 1, and run a call on stream 3 to its end."""
    assert await raw.call("Forever", b"", end=False) == 1
    await raw.until_ended(await raw.call("One", b""))


async def cut(raw: Raw, data: bytes) -> None:
    """Send `data` and wait for the end of the connection."""
    try:
        await raw.send(data)
        async with asyncio.timeout(60):
            while not raw.eof:
                await raw.receive()
    except ConnectionError:  # the connection was cut before all bytes were sent
        pass


@pytest.mark.parametrize("kind", KINDS)
async def test_each_kind_of_flood_is_cut(serve: Serve, kind: str) -> None:
    """A client that sends only empty frames of one kind gets a GOAWAY, and the connection is closed."""
    async with serve(LIMITS) as echo, raw_client(echo.port) as raw:
        await settled(raw)
        await cut(raw, dict(nothing(raw))[kind] * 1000)
        assert raw.eof
        assert raw.goaway is not None
        assert raw.goaway.error_code == ErrorCodes.ENHANCE_YOUR_CALM
        assert echo.seen.running == 0


async def test_goaway_again_and_again_is_cut(serve: Serve) -> None:
    """A connection whose client repeats GOAWAY frames is closed, even while a call runs."""
    async with serve(LIMITS) as echo, raw_client(echo.port) as raw:
        await settled(raw)
        await cut(raw, GoAwayFrame(0, additional_data=b"x" * 16_000).serialize() * 100)
        assert echo.seen.running == 0


async def test_resets_that_a_client_makes_the_server_send_are_its_own(serve: Serve) -> None:
    """A client that enlarges a window beyond the limit makes the server reset the call. The reset is charged to the
    client (MadeYouReset)."""
    async with serve(LIMITS) as echo, raw_client(echo.port) as raw:
        for _ in range(60):
            stream_id = await raw.call("Forever", b"")
            await raw.send(WindowUpdateFrame(stream_id, 2**31 - 1).serialize())
        async with asyncio.timeout(60):
            while not raw.eof and raw.goaway is None:
                await raw.receive()
        assert raw.goaway is not None
        assert raw.goaway.error_code == ErrorCodes.ENHANCE_YOUR_CALM


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [("Nothing", "x", "y"), ("One", "content-type", "text/plain"), ("One", "grpc-encoding", "lzma")],
)
async def test_refused_calls_are_charged(serve: Serve, method: str, name: str, value: str) -> None:
    """A call with an unknown method, content type or encoding is charged like a reset."""
    async with serve(LIMITS) as echo, raw_client(echo.port) as raw:
        for _ in range(60):
            await raw.call(method, b"", end=True, **{name: value})
        async with asyncio.timeout(60):
            while not raw.eof and raw.goaway is None:
                await raw.receive()
        assert raw.goaway is not None


@pytest.mark.parametrize(("part", "count"), [(b"", 17), (b"x" * 8000, 9)])
async def test_a_header_block_is_bounded_before_it_is_whole(serve: Serve, part: bytes, count: int) -> None:
    """A header block with too many or too large CONTINUATION frames closes the connection before the block is
    buffered."""
    async with serve() as echo, raw_client(echo.port) as raw:
        while not raw.events:
            await raw.receive()
        await cut(raw, HeadersFrame(1, b"").serialize() + ContinuationFrame(1, part).serialize() * count)
        assert raw.eof
        assert raw.goaway is not None
        assert raw.goaway.error_code == ErrorCodes.ENHANCE_YOUR_CALM


@pytest.mark.parametrize("updates", [b"\x20" * 3, b"\x3f\x01" * 3])
async def test_a_header_block_changes_its_table_twice_at_most(serve: Serve, updates: bytes) -> None:
    """A third change of the table size in a header block closes the connection, because such changes are costly to
    decode and are not charged as header fields."""
    async with serve() as echo, raw_client(echo.port) as raw:
        while not raw.events:
            await raw.receive()
        head = HeadersFrame(1, updates, flags=("END_HEADERS", "END_STREAM"))
        await cut(raw, head.serialize())
        assert raw.eof
        assert raw.goaway is not None
        assert raw.goaway.error_code == ErrorCodes.ENHANCE_YOUR_CALM


async def test_nothing_is_handled_after_the_cut(serve: Serve) -> None:
    """When a connection is closed for a flood, the remaining frames of the same read are dropped, including frames that
    open calls."""
    async with serve(LIMITS) as echo, raw_client(echo.port) as raw:
        await settled(raw)
        echo.seen.started.clear()
        head = [(":method", "POST"), (":scheme", "http"), (":path", "/test.Echo/Forever"), (":authority", "x")]
        raw.h2.send_headers(5, [*head, ("content-type", "application/grpc")])
        raw.h2.send_data(5, b"\x00" * 5, end_stream=True)
        await cut(raw, UNKNOWN * 1000 + raw.h2.data_to_send())
        assert raw.eof
        assert not echo.seen.started.is_set()


async def test_a_client_that_reads_many_streams_may_say_so(serve: Serve) -> None:
    """A client that reads 64 streams may send two window updates and a ping for each token. The flood limits do not
    charge these frames."""
    limits = http2.ServerLimits(resets_burst=20, resets_per_s=0.001)
    streams, tokens = 64, 200
    async with serve(limits) as echo, raw_client(echo.port) as raw:
        ids = [await raw.call("Many", b"%dx12" % tokens) for _ in range(streams)]
        seen = 0
        async with asyncio.timeout(60):
            while not raw.eof and sum(map(len, raw.data.values())) < streams * tokens * 17:
                await raw.receive(acknowledge=False)
                for event in raw.events[seen:]:
                    if isinstance(event, DataReceived) and event.flow_controlled_length:
                        for window in (None, event.stream_id):
                            with suppress(StreamClosedError):
                                raw.h2.increment_flow_control_window(event.flow_controlled_length, window)
                            await raw.flush()
                        await raw.send(PingFrame(0, b"12345678").serialize())
                seen = len(raw.events)
        assert raw.goaway is None
        assert all(len(raw.data[stream_id]) == tokens * 17 for stream_id in ids)


async def test_windows_of_one_byte_justify_nothing(serve: Serve) -> None:
    """A connection is closed if its client enlarges the flow-control window by one byte at a time. It is closed even
    though each of these updates lets the server send a byte."""
    async with serve(LIMITS) as echo, raw_client(echo.port, window=1 << 30) as raw:
        stream_id = await raw.call("Many", b"100x10000")
        while len(raw.data.get(stream_id, b"")) < 65_535:
            await raw.receive(acknowledge=False)
        for _ in range(200_000 // 500):
            await cut_or_go_on(raw, WindowUpdateFrame(0, 1).serialize() * 500)
            if raw.eof:
                break
        assert raw.eof


async def cut_or_go_on(raw: Raw, data: bytes) -> None:
    """Send `data` and read once. Sets `raw.eof` if the connection has ended."""
    try:
        await raw.send(data)
        await raw.receive(acknowledge=False)
    except ConnectionError:
        raw.eof = True
    except ProtocolError:  # the updates bypassed this client's h2
        pass
