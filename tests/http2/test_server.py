"""The server works with grpc's own client, and withstands misbehaving clients."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe.frame import GoAwayFrame, HeadersFrame
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster import http2
from tests.http2.conftest import SERVICE, Serve, _serve
from tests.http2.raw import raw_client
from tests.support.certificates import Authority
from tests.support.cluster import until

pytestmark = pytest.mark.slow

CODE = grpc.StatusCode


def unary_unary(channel: grpc.aio.Channel, method: str) -> Any:
    """Return a method of the echo server that answers one request with one message. Messages are bytes."""
    return channel.unary_unary(f"/{SERVICE}/{method}")


def unary_stream(channel: grpc.aio.Channel, method: str) -> Any:
    """Return a method of the echo server that answers one request with a stream. Messages are bytes."""
    return channel.unary_stream(f"/{SERVICE}/{method}")


def stream_stream(channel: grpc.aio.Channel, method: str) -> Any:
    """Return a method of the echo server that answers a stream of requests with a stream of messages. Messages are
    bytes."""
    return channel.stream_stream(f"/{SERVICE}/{method}")


async def test_one_message_with_metadata(serve: Serve) -> None:
    """Text and binary metadata arrive in both directions, and trailers arrive at the end."""
    async with serve() as echo, grpc.aio.insecure_channel(echo.address) as channel:
        call = unary_unary(channel, "One")(b"hello", metadata=(("x-text", "a b"), ("x-raw-bin", b"\x00\x01")))
        assert await call == b"hello"
        assert dict(await call.initial_metadata())["x-begin"] == "yes"
        assert dict(await call.trailing_metadata())["x-end"] == "yes"
        assert ("x-text", "a b") in echo.seen.metadata
        assert ("x-raw-bin", b"\x00\x01") in echo.seen.metadata


async def test_errors_become_statuses(serve: Serve) -> None:
    """An abort, an unexpected exception and an unknown method end the call with a status, and the exception's text is
    not sent."""
    async with serve() as echo, grpc.aio.insecure_channel(echo.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as aborted:
            await unary_unary(channel, "One")(b"abort")
        assert (aborted.value.code(), aborted.value.details()) == (CODE.NOT_FOUND, "no, ünterwegs 100 %\n")
        assert dict(aborted.value.trailing_metadata())["raw-bin"] == b"\x00\xff"
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await unary_unary(channel, "One")(b"raise")
        assert raised.value.code() is CODE.UNKNOWN
        assert "secret" not in str(raised.value.details())
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await unary_unary(channel, "Nothing")(b"")
        assert unknown.value.code() is CODE.UNIMPLEMENTED


async def test_compressed_requests(serve: Serve) -> None:
    """A compressed request reaches the handler decompressed."""
    async with serve() as echo, grpc.aio.insecure_channel(echo.address, compression=grpc.Compression.Gzip) as channel:
        assert await unary_unary(channel, "One")(b"z" * 10_000) == b"z" * 10_000


async def test_a_stream_each_way(serve: Serve) -> None:
    """A method that echoes a stream returns messages of any size in order. The answer stream ends after the client has
    half-closed the request stream."""
    sent = [bytes([i % 256]) * (i * 997 % 300_000) for i in range(60)]

    async def messages() -> AsyncIterator[bytes]:
        for message in sent:
            yield message

    async with serve() as echo, grpc.aio.insecure_channel(echo.address) as channel:
        assert [m async for m in stream_stream(channel, "Back")(messages())] == sent


async def test_deadline_and_cancel_end_the_handler(serve: Serve) -> None:
    """When a call reaches its deadline or is cancelled, the handler's task is cancelled."""
    async with serve() as echo, grpc.aio.insecure_channel(echo.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await unary_unary(channel, "Forever")(b"", timeout=0.1)
        assert late.value.code() is CODE.DEADLINE_EXCEEDED
        await asyncio.wait_for(echo.seen.cancelled.wait(), 60)
        echo.seen.started.clear()
        echo.seen.cancelled.clear()
        call = unary_unary(channel, "Forever")(b"")
        await asyncio.wait_for(echo.seen.started.wait(), 60)
        call.cancel()
        await asyncio.wait_for(echo.seen.cancelled.wait(), 60)


async def test_messages_over_the_limit(serve: Serve) -> None:
    """A message over the size limit is refused, and the connection stays open."""
    limits = http2.ServerLimits(max_message_bytes=1000)
    async with serve(limits) as echo, grpc.aio.insecure_channel(echo.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await unary_unary(channel, "One")(b"x" * 1001)
        assert refused.value.code() is CODE.RESOURCE_EXHAUSTED
        assert await unary_unary(channel, "One")(b"x" * 1000) == b"x" * 1000


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(window=st.integers(1, 400), count=st.integers(1, 20), size=st.integers(0, 900))
def test_any_window_gives_the_same_bytes(window: int, count: int, size: int) -> None:
    """Messages arrive whole and in order for any size of the client's flow-control window."""

    async def run() -> None:
        async with _serve() as echo, raw_client(echo.port, window) as raw:
            stream_id = await raw.call("Many", b"%dx%d" % (count, size))
            trailers = await raw.until_ended(stream_id)
            assert trailers["grpc-status"] == "0"
            expected = b"".join(b"\x00" + size.to_bytes(4, "big") + bytes([i % 251]) * size for i in range(count))
            assert bytes(raw.data.get(stream_id, b"")) == expected

    asyncio.run(run())


async def test_a_client_that_does_not_read_stops_its_writer_and_nobody_else(serve: Serve) -> None:
    """If a client's flow-control window is closed, the handler of its call sends one more message and then waits. Other
    calls continue."""
    async with serve() as echo, raw_client(echo.port, window=100) as raw:
        await raw.call("Many", b"1000x50")
        other = await raw.call("One", b"still here")
        while not raw.trailers(other):
            await raw.receive(acknowledge=False)
        assert echo.seen.written <= 2


async def test_a_wider_window_is_confirmed_before_it_is_used(serve: Serve) -> None:
    """The server acknowledges new settings before data uses the larger window; otherwise grpc's client resets the
    stream."""
    async with serve() as echo, raw_client(echo.port, window=100) as raw:
        stream_id = await raw.call("Many", b"1x4000")
        while len(raw.data.get(stream_id, b"")) < 100:
            await raw.receive(acknowledge=False)
        raw.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 8000})
        await raw.flush()
        trailers = await raw.until_ended(stream_id)  # h2 raises FlowControlError for bytes beyond the window
        assert trailers["grpc-status"] == "0"
        assert len(raw.data[stream_id]) == 4005


async def test_a_handler_that_does_not_read_stops_its_client(serve: Serve) -> None:
    """The request bytes that a handler has not read are limited by the stream's flow-control window."""
    limits = http2.ServerLimits(window_bytes=10_000)
    async with serve(limits) as echo, raw_client(echo.port) as raw:
        while not raw.events:  # the server's settings, with the window size, come first
            await raw.receive()
        stream_id = await raw.call("SlowReader", b"x" * 1000, end=False)
        while (room := raw.h2.local_flow_control_window(stream_id)) >= 1005:
            raw.h2.send_data(stream_id, b"\x00" + (1000).to_bytes(4, "big") + b"x" * 1000)
            await raw.flush()
            unary = await raw.call("One", b"?")
            await raw.until_ended(unary)
        assert room < 1005, "the handler read one message: only its bytes were returned to the window"


async def test_what_was_read_is_given_back_once(serve: Serve) -> None:
    """When a handler has read some bytes, the server enlarges the client's flow-control window by the same number once.
    So the window never grows beyond its first size."""
    limits = http2.ServerLimits(window_bytes=10_000, connection_window_bytes=65_535)
    async with serve(limits) as echo, raw_client(echo.port, window=1 << 20) as raw:
        while not raw.events:
            await raw.receive()
        stream_id = await raw.call("Back", b"first", end=False)
        for size in (1, 700, 3000) * 20:
            while raw.h2.local_flow_control_window(stream_id) < size + 5:
                await raw.receive()
            raw.h2.send_data(stream_id, b"\x00" + size.to_bytes(4, "big") + b"x" * size)
            await raw.flush()
        raw.h2.end_stream(stream_id)
        await raw.flush()
        assert (await raw.until_ended(stream_id))["grpc-status"] == "0"
        assert len(raw.data[stream_id]) == 10 + sum(size + 5 for size in (1, 700, 3000)) * 20
        assert raw.h2.outbound_flow_control_window <= 65_535


async def test_a_client_that_says_goodbye_gets_its_running_calls(serve: Serve) -> None:
    """After a client's GOAWAY, running calls finish, and then the connection is closed."""
    async with serve() as echo, raw_client(echo.port) as raw:
        stream_id = await raw.call("Many", b"5000x20")
        await raw.send(GoAwayFrame(0, last_stream_id=0, error_code=0).serialize())
        assert (await raw.until_ended(stream_id))["grpc-status"] == "0"
        assert len(raw.data[stream_id]) == 5000 * 25
        while not raw.eof:
            await raw.receive()


async def test_a_flood_of_resets_ends_the_connection(serve: Serve) -> None:
    """The connection of a client that opens and resets streams very fast is closed (rapid reset)."""
    limits = http2.ServerLimits(resets_burst=50, resets_per_s=1)
    async with serve(limits) as echo, raw_client(echo.port) as raw:
        for _ in range(60):
            stream_id = await raw.call("Forever", b"")
            raw.h2.reset_stream(stream_id)
        await raw.flush()
        while not raw.eof and raw.goaway is None:
            await raw.receive()
        assert raw.goaway is not None
        assert raw.goaway.error_code == ErrorCodes.ENHANCE_YOUR_CALM


async def test_thousands_of_requests_in_one_read_leave_the_loop_to_others(serve: Serve) -> None:
    """Thousands of tiny requests in one read are parsed in short slices of time. This matters because h2 walks all
    streams for each request."""
    async with serve() as echo, raw_client(echo.port) as raw:
        await raw.until_ended(await raw.call("One", b""))
        head = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "x")]
        encoder = raw.h2.encoder
        data = [HeadersFrame(n, encoder.encode(head), flags=("END_HEADERS",)).serialize() for n in range(3, 8003, 2)]
        (connection,) = echo.server.connections
        await raw.send(b"".join(data))
        passes = 0
        async with asyncio.timeout(60):
            while connection.core.h2.highest_inbound_stream_id < 8001:
                await asyncio.sleep(0)
                passes += connection.core.h2.highest_inbound_stream_id > 1
        assert passes > 20, "each pass of the loop parses for two milliseconds"
        assert len(connection.core.h2.streams) < 10


async def test_an_old_connection_is_replaced_without_a_failed_call(serve: Serve) -> None:
    """When a connection reaches its age limit, running calls finish, and new calls use a new connection."""
    async with (
        serve(http2.ServerLimits(age_s=0.3, age_grace_s=30)) as echo,
        grpc.aio.insecure_channel(echo.address) as channel,
    ):
        method = unary_unary(channel, "One")
        stream = unary_stream(channel, "Many")(b"3000x10")
        seen: set[str] = set()
        async with asyncio.timeout(60):
            while len(seen) < 3:
                assert await method(b"again") == b"again"
                seen.update(connection.core.peer for connection in echo.server.connections)
        assert len([message async for message in stream]) == 3000


async def test_an_old_connection_cuts_no_stream(serve: Serve) -> None:
    """When a connection has exceeded its age limit and the grace period, a call whose request is complete runs on. A
    call whose client may still send requests ends with UNAVAILABLE."""
    async with (
        serve(http2.ServerLimits(age_s=0.2, age_grace_s=0.2)) as echo,
        grpc.aio.insecure_channel(echo.address) as channel,
    ):
        forever = unary_unary(channel, "Forever")(b"")
        await asyncio.wait_for(echo.seen.started.wait(), 60)
        session = stream_stream(channel, "Back")()
        await session.write(b"a")
        assert await session.read() == b"a"
        assert await asyncio.wait_for(session.code(), 60) is CODE.UNAVAILABLE
        assert "age limit" in await session.details()
        assert echo.seen.running == 1
        assert not forever.done()
        forever.cancel()
        await asyncio.wait_for(echo.seen.cancelled.wait(), 60)
        await until(lambda: not echo.server.connections, "the connection is closed after its last call")


async def test_stop_waits_for_calls_and_then_ends_them(serve: Serve) -> None:
    """When the server stops, a call that does not finish within the grace period ends with UNAVAILABLE."""
    async with serve() as echo, grpc.aio.insecure_channel(echo.address) as channel:
        call = unary_unary(channel, "Forever")(b"")
        await asyncio.wait_for(echo.seen.started.wait(), 60)
        await echo.server.stop(0.2)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await call
        assert ended.value.code() is CODE.UNAVAILABLE
        assert not echo.seen.running


async def test_a_client_sees_the_end_of_tls_at_once(serve: Serve, tmp_path: Path) -> None:
    """When the server closes a TLS connection, it closes TCP right after TLS. grpc's client ignores the end of TLS and
    would otherwise wait."""
    files = Authority(tmp_path).issue("echo")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(files.cert_file, files.key_file)
    tls.set_alpn_protocols(["h2"])
    roots = grpc.ssl_channel_credentials(files.ca_file.read_bytes())
    async with serve(None, tls) as echo, grpc.aio.secure_channel(echo.address, roots) as channel:
        call = unary_unary(channel, "Forever")(b"")
        await asyncio.wait_for(echo.seen.started.wait(), 60)
        for connection in echo.server.connections:
            connection.lifetime.close()
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await asyncio.wait_for(call, 60)
        assert ended.value.code() is CODE.UNAVAILABLE


def silent_clients(port: int) -> Iterator[tuple[str, bytes]]:
    """Yield (name, first bytes) of clients that do not speak HTTP/2."""
    yield "http1", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    yield "half", b"PRI * HTTP/2.0\r\n"
    yield "noise", b"\x00" * 64
    yield "nothing", b""


async def test_who_does_not_speak_http2_is_cut_off(serve: Serve) -> None:
    """An HTTP/1.1 client gets an answer. A client that sends random bytes, an incomplete preface or nothing is
    disconnected without an answer. A gRPC client is served afterwards."""
    async with serve(http2.ServerLimits(hello_s=0.3)) as echo:
        for name, begin in silent_clients(echo.port):
            reader, writer = await asyncio.open_connection("127.0.0.1", echo.port)
            writer.write(begin)
            answer = await asyncio.wait_for(reader.read(), 60)
            writer.close()
            assert answer.count(b"HTTP/1.1") == (name == "http1")
            assert (b"speaks gRPC" in answer) is (name == "http1")
        async with grpc.aio.insecure_channel(echo.address) as channel:
            assert await unary_unary(channel, "One")(b"hello") == b"hello"


async def test_a_request_that_never_comes_whole(serve: Serve) -> None:
    """A call whose request is not complete in time ends with DEADLINE_EXCEEDED."""
    async with serve(http2.ServerLimits(request_s=0.2)) as echo, raw_client(echo.port) as raw:
        stream_id = await raw.call("One", b"half", end=False)
        trailers = await asyncio.wait_for(raw.until_ended(stream_id), 60)
        assert trailers["grpc-status"] == str(CODE.DEADLINE_EXCEEDED.value[0])


async def test_two_servers_share_a_port(serve: Serve) -> None:
    """A second server can bind the same port if both use SO_REUSEPORT; without that option the bind fails."""
    first, second = http2.Server(), http2.Server()
    port = await first.start("127.0.0.1", 0, shared=True)
    try:
        assert await second.start("127.0.0.1", port, shared=True) == port
        with pytest.raises(OSError, match="in use"):
            await http2.Server().start("127.0.0.1", port)
    finally:
        await first.stop(0)
        await second.stop(0)
    assert socket.socket().connect_ex(("127.0.0.1", port)) != 0
