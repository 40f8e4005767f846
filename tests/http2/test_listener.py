"""The listener accepts connections within the caps of its port, tested over real sockets."""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from cluster import http2
from cluster.http2.connection_table import Pool
from cluster.http2.listener import PAUSE_S
from tests.http2.conftest import SERVICE, Serve
from tests.support.certificates import Authority
from tests.support.cluster import until

WAIT_S = 60.0
CAP = 16
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


@asynccontextmanager
async def strangers(port: int, count: int, data: bytes = b"") -> AsyncIterator[list[asyncio.StreamReader]]:
    """Open `count` connections that send `data` and then nothing."""
    made = [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]
    try:
        for _, writer in made:
            writer.write(data)
        yield [reader for reader, _ in made]
    finally:
        for _, writer in made:
            writer.transport.abort()
        await asyncio.gather(*(writer.wait_closed() for _, writer in made), return_exceptions=True)


def channel_to(port: int, credentials: grpc.ChannelCredentials | None = None) -> grpc.aio.Channel:
    """Open a channel with its own connection."""
    options = (("grpc.use_local_subchannel_pool", 1),)
    if credentials is not None:
        return grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options)
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options)


async def call(channel: grpc.aio.Channel) -> bytes:
    """Make one call and return the answer."""
    method: Any = channel.unary_unary(f"/{SERVICE}/One")
    return bytes(await method(b"hello", timeout=WAIT_S))


@pytest.mark.parametrize("data", [b"", b"PRI * HT", PREFACE + SETTINGS], ids=["silent", "half a preface", "greeted"])
async def test_a_caller_gets_in_beside_idle_strangers_and_stays(serve: Serve, data: bytes) -> None:
    """A client connects and stays connected although idle connections fill the port. Refusals are logged in at most one
    line a second."""
    pool = Pool(CAP)
    with capture_logs() as lines:
        async with serve(None, None, http2.ConnectionAdmission(pool)) as echo, channel_to(echo.port) as first:
            assert await call(first) == b"hello"
            async with strangers(echo.port, 100, data), channel_to(echo.port) as second:
                assert await call(second) == b"hello"
                assert await call(first) == b"hello"
                assert len(pool) <= CAP
                assert len(echo.server.connections) <= CAP
        await until(lambda: not len(pool), "all places are free")
    refusals = [line for line in lines if line["event"] == "connection.refused"]
    assert 1 <= len(refusals) <= 4
    assert sum(line.get("closed_for_others", 0) for line in refusals) > 0


@pytest.mark.slow
async def test_those_who_never_finish_the_handshake_make_room(serve: Serve, tmp_path: Path) -> None:
    """Connections that stall in the TLS handshake count against the cap, and are closed when other connections
    arrive."""
    files = Authority(tmp_path).issue("echo")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(files.cert_file, files.key_file)
    tls.set_alpn_protocols(["h2"])
    roots = grpc.ssl_channel_credentials(files.ca_file.read_bytes())
    pool = Pool(CAP)
    async with (
        serve(None, tls, http2.ConnectionAdmission(pool)) as echo,
        strangers(echo.port, 100) as readers,
        channel_to(echo.port, roots) as channel,
    ):
        assert await call(channel) == b"hello"
        ended, kept = await asyncio.wait([asyncio.create_task(reader.read()) for reader in readers], timeout=0.5)
        for task in kept:
            task.cancel()
        await asyncio.gather(*ended, *kept, return_exceptions=True)
        assert len(kept) < CAP


async def test_calls_under_way_keep_their_places(serve: Serve) -> None:
    """When all connections of a full port have running calls, a new connection is refused and the calls continue."""
    async with serve(None, None, http2.ConnectionAdmission(Pool(2))) as echo:
        channels = [channel_to(echo.port) for _ in range(2)]
        streams: list[Any] = [channel.stream_stream(f"/{SERVICE}/Back")() for channel in channels]
        for stream in streams:
            await stream.write(b"a")
            assert await stream.read() == b"a"
        for _ in range(20):
            with pytest.raises(ConnectionError):  # noqa: PT012 - a refusal comes while connecting or after
                reader, _ = await asyncio.open_connection("127.0.0.1", echo.port)
                if not await reader.read():
                    raise ConnectionError("closed")
        for stream in streams:
            await stream.write(b"b")
            assert await stream.read() == b"b"
            await stream.done_writing()
        for channel in channels:
            await channel.close()


async def test_without_descriptors_one_line_is_logged_and_later_all_are_served(serve: Serve) -> None:
    """When file descriptors run out, one line is logged, open connections are served, and waiting clients are served
    later."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    loop = asyncio.get_running_loop()
    with capture_logs() as lines:
        async with serve() as echo, channel_to(echo.port) as before:
            assert await call(before) == b"hello"
            waiting = [socket.socket() for _ in range(50)]
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
                for client in waiting:
                    client.setblocking(False)
                    await loop.sock_connect(client, ("127.0.0.1", echo.port))
                assert await call(before) == b"hello"
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for client in waiting:
                client.sendall(PREFACE + SETTINGS)
                assert await asyncio.wait_for(loop.sock_recv(client, 9), PAUSE_S + WAIT_S)
                client.close()
    assert 1 <= len([line for line in lines if "no_descriptor_left" in line]) <= 2
