"""The gRPC client is tested against this server, grpc's own server, and servers that close or stay silent."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import grpc.aio
import pytest
from hyperframe.frame import DataFrame

from cluster.http2.client import CallEnded, ClientCall, GrpcClient, connect
from tests.http2.conftest import SERVICE, Serve

CODE = grpc.StatusCode


def open_call(client: GrpcClient, method: str, *, metadata: tuple[tuple[str, str | bytes], ...] = ()) -> ClientCall:
    """Open a call of a method of the echo server, with messages as bytes."""
    return client.call(f"/{SERVICE}/{method}", bytes, bytes, metadata)


async def answers_to(client: GrpcClient, method: str, request: bytes) -> list[bytes]:
    """Return all answers to one request."""
    call = open_call(client, method)
    call.send(request)
    call.done_writing()
    return [message async for message in call]


async def test_calls_one_after_the_other_and_at_once(serve: Serve) -> None:
    """Requests, answers and metadata arrive whole when one connection carries many calls."""
    async with serve() as echo, await connect(echo.address) as client:
        call = open_call(client, "One", metadata=(("x-text", "a b"), ("x-raw-bin", b"\x00\x01")))
        call.send(b"hello")
        call.done_writing()
        assert await call.read() == b"hello"
        assert await call.read() is grpc.aio.EOF
        assert {("x-text", "a b"), ("x-raw-bin", b"\x00\x01")} <= set(echo.seen.metadata)
        requests = [b"%d" % i for i in range(50)]
        answers = await asyncio.gather(*(answers_to(client, "One", request) for request in requests))
        assert answers == [[r] for r in requests]
        assert not client.connection.calls


async def test_what_is_received_is_not_written_out(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client never serializes a received frame again. h2 would do so by default, to build a debug message that is
    not logged."""

    def again(frame: DataFrame) -> bytes:
        assert not frame.data, f"a frame of {frame.body_len} bytes is serialized once more"
        return b""

    async with serve() as echo, await connect(echo.address) as client:
        monkeypatch.setattr(DataFrame, "serialize_body", again)
        assert await answers_to(client, "One", b"hello") == [b"hello"]


async def test_a_status_is_told(serve: Serve) -> None:
    """An aborted call, an unknown method and an answer over the size limit raise CallEnded with the matching status."""
    async with serve() as echo, await connect(echo.address, max_message_bytes=1000) as client:
        with pytest.raises(CallEnded) as aborted:
            await answers_to(client, "One", b"abort")
        assert (aborted.value.code, aborted.value.details) == (CODE.NOT_FOUND, "no, ünterwegs 100 %\n")
        with pytest.raises(CallEnded) as unknown:
            await answers_to(client, "Nothing", b"")
        assert unknown.value.code is CODE.UNIMPLEMENTED
        with pytest.raises(CallEnded) as large:
            await answers_to(client, "Many", b"1x1001")
        assert large.value.code is CODE.INTERNAL
        assert await answers_to(client, "One", b"still there") == [b"still there"]


async def test_more_than_the_windows_hold(serve: Serve) -> None:
    """A writer waits while the flow-control windows are full, and all messages return whole and in order."""
    async with serve() as echo, await connect(echo.address, window_bytes=100_000) as client:
        answers = await answers_to(client, "Many", b"300x5000")
        assert answers == [bytes([i % 251]) * 5000 for i in range(300)]
        call = open_call(client, "Back")
        sent = [bytes([i % 251]) * 300_000 for i in range(30)]

        async def write() -> None:
            for message in sent:
                await call.write(message)
            call.done_writing()

        writing = asyncio.create_task(write())
        assert [message async for message in call] == sent
        await writing


async def test_a_cancelled_call_is_cancelled_there(serve: Serve) -> None:
    """When a client cancels a call, the server's handler ends, and the connection continues with other calls."""
    async with serve() as echo, await connect(echo.address) as client:
        call = open_call(client, "Forever")
        call.send(b"")
        call.done_writing()
        await asyncio.wait_for(echo.seen.started.wait(), 60)
        call.cancel()
        await asyncio.wait_for(echo.seen.cancelled.wait(), 60)
        with pytest.raises(CallEnded) as ended:
            await call.read()
        assert ended.value.code is CODE.CANCELLED
        assert await answers_to(client, "One", b"next") == [b"next"]


async def test_a_server_that_goes_away_ends_reads_and_writes(serve: Serve) -> None:
    """When the server goes away, pending reads and further writes raise CallEnded, and no further call can be
    opened."""
    async with serve() as echo, await connect(echo.address) as client:
        call = open_call(client, "Back")
        await call.write(b"there")
        assert await call.read() == b"there"
        reading = asyncio.create_task(call.read())
        await echo.server.stop(0)
        with pytest.raises(CallEnded) as ended:
            await asyncio.wait_for(reading, 60)
        assert ended.value.code is CODE.UNAVAILABLE
        with pytest.raises(CallEnded):
            await call.write(b"too late")
        assert not client.usable
        with pytest.raises(CallEnded):
            open_call(client, "One")


async def test_a_silent_server_is_given_up() -> None:
    """When a server keeps its connection open and answers no ping, the client ends the connection's calls."""
    held: list[Any] = []

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)
        while await reader.read(65_536):
            pass
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with await connect(f"127.0.0.1:{port}", ping_s=0.05, ping_answer_s=0.05) as client:
            with pytest.raises(CallEnded) as ended:
                await asyncio.wait_for(open_call(client, "One").read(), 60)
            assert ended.value.details == "no answer to a ping"


async def test_a_call_at_rest_stays(serve: Serve) -> None:
    """A client whose event loop is late keeps its connection if the answer to its ping arrived in time."""
    async with serve() as echo, await connect(echo.address, ping_s=0.02, ping_answer_s=0.1) as client:
        call = open_call(client, "Back")
        await call.write(b"there")
        assert await call.read() == b"there"
        for _ in range(5):
            for pinged in (True, False):  # each ping, and then its answer
                while client.connection.keepalive.answered == pinged:  # noqa: ASYNC110 - in this very pass of the loop
                    await asyncio.sleep(0)
            time.sleep(0.15)  # noqa: ASYNC251 - the loop is late
            await asyncio.sleep(0.001)
            assert client.usable
        await call.write(b"still there")
        assert await call.read() == b"still there"


async def test_nobody_there(unused_tcp_port: int) -> None:
    """A connection attempt to an unused port raises ConnectionRefusedError at once."""
    with pytest.raises(ConnectionRefusedError):
        await connect(f"127.0.0.1:{unused_tcp_port}")


async def test_grpcs_own_server() -> None:
    """The client works with grpc's own server: calls with streams in both directions, and errors that consist of
    trailers only."""

    async def back(messages: Any, context: Any) -> Any:
        async for message in messages:
            if message == b"abort":
                await context.abort(CODE.NOT_FOUND, "nö")
            yield message

    handler: Any = grpc.stream_stream_rpc_method_handler(back)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Back": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with await connect(f"127.0.0.1:{port}") as client:
            assert await answers_to(client, "Back", b"x" * 200_000) == [b"x" * 200_000]
            with pytest.raises(CallEnded) as ended:
                await answers_to(client, "Back", b"abort")
            assert (ended.value.code, ended.value.details) == (CODE.NOT_FOUND, "nö")
    finally:
        await server.stop(0)
