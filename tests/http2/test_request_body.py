"""Tests of the bodies of requests. A request without a credential is refused. A body of a request with a credential may
have to wait while other buffered bodies use up the limit, but in the end it is always received."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import http2
from cluster.policy.limits.request_bytes import ByteBounds, RequestBytes
from tests.http2.conftest import SERVICE, Echo, _serve
from tests.http2.raw import Raw, raw_client
from tests.support.cluster import until

pytestmark = pytest.mark.slow

WINDOW = 65_535
MIB = 1 << 20
CODE = grpc.StatusCode


class KeyGate:
    """A gate that admits a call with metadata `key: NAME` as tenant NAME, once `open` is set."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.asked = 0

    async def admit(self, call: Any) -> str | None:
        """Admit or refuse a call, as Gate specifies."""
        self.asked += 1
        await self.open.wait()
        if call.path.endswith("/Many"):
            return None
        key = dict(call.invocation_metadata()).get("key")
        if not key:
            await call.abort(CODE.UNAUTHENTICATED, "no key")
        return str(key)


@asynccontextmanager
async def serving(
    bounds: ByteBounds, limits: http2.ServerLimits | None = None
) -> AsyncIterator[tuple[Echo, KeyGate, RequestBytes]]:
    """Start a server with an authentication gate and a budget of request bytes. At the end, check that no bytes are
    reserved in the budget."""
    gate, budget = KeyGate(), RequestBytes(bounds, asyncio.get_running_loop().time)
    async with _serve(limits, gate=gate, budget=budget) as echo:
        yield echo, gate, budget
    # The server does not wait for the tasks of calls that were reset: they end one pass after their cancellation.
    await until(lambda: (budget.held, budget.waiting) == (0, 0), "the budget is empty")


async def greeted(raw: Raw) -> None:
    """Wait for the server's settings."""
    while not raw.events:
        await raw.receive()


async def push(raw: Raw, stream_id: int, data: bytearray) -> None:
    """Send as much of `data` as the flow-control windows allow."""
    while data and (room := raw.h2.local_flow_control_window(stream_id)) > 0:
        size = min(room, len(data), raw.h2.max_outbound_frame_size)
        raw.h2.send_data(stream_id, bytes(data[:size]))
        del data[:size]
    await raw.flush()


async def push_until_stalled(raw: Raw, uploads: dict[int, bytearray], quiet_s: float = 0.3) -> None:
    """Send parts of all uploads until the server has kept its flow-control windows closed for `quiet_s` seconds."""
    with suppress(TimeoutError):
        while True:
            for stream_id, data in uploads.items():
                await push(raw, stream_id, data)
            await asyncio.wait_for(raw.receive(), quiet_s)


def framed(message: bytes) -> bytearray:
    """Return a message with the prefix that it has on the wire."""
    return bytearray(b"\x00" + len(message).to_bytes(4, "big") + message)


async def test_a_wrong_key_is_refused_at_the_head() -> None:
    """A call without a valid key is refused when its headers arrive, before its request body is received."""
    async with serving(ByteBounds(MIB, MIB, MIB)) as (echo, _, _), raw_client(echo.port) as raw:
        stream_id = await raw.call("One", None)
        assert (await raw.until_ended(stream_id))["grpc-status"] == str(CODE.UNAUTHENTICATED.value[0])


async def test_before_a_credential_a_connection_brings_in_one_window() -> None:
    """Until a credential is accepted, all calls of a connection together can send at most one window of bytes."""
    async with serving(ByteBounds(MIB, MIB, MIB)) as (echo, gate, _), raw_client(echo.port) as raw:
        gate.open.clear()
        await greeted(raw)
        uploads = {await raw.call("One", None, key="a"): framed(bytes(MIB // 2)) for _ in range(40)}
        await push_until_stalled(raw, uploads)
        unsent = sum(map(len, uploads.values()))
        assert 40 * (MIB // 2 + 5) - unsent == WINDOW
        gate.open.set()
        async with asyncio.timeout(60):
            while any(uploads.values()):
                for stream_id, data in uploads.items():
                    await push(raw, stream_id, data)
                    if not data and raw.h2.streams[stream_id].state_machine.state.name == "OPEN":
                        raw.h2.end_stream(stream_id)
                await raw.flush()
                await raw.receive()


async def test_what_a_tenant_has_not_finished_is_bounded() -> None:
    """A tenant's long, incomplete requests hold at most as many bytes as its budget allows. A short request needs no
    part of the budget, so it is accepted even while the budget is used up."""
    async with serving(ByteBounds(2 * MIB, 2 * MIB, 8 * MIB)) as (echo, _, budget), raw_client(echo.port) as raw:
        await greeted(raw)
        uploads = {await raw.call("One", None, key="a"): framed(bytes(MIB)) for _ in range(20)}
        for data in uploads.values():
            del data[-1:]
        await push_until_stalled(raw, uploads)
        assert budget.held <= 2 * MIB
        unsent = sum(map(len, uploads.values()))
        assert 20 * (MIB + 4) - unsent <= 2 * MIB + 20 * WINDOW
        other = await raw.call("One", b"small", key="a")
        assert (await raw.until_ended(other))["grpc-status"] == "0", "short requests are accepted meanwhile"


async def test_a_message_without_a_credential_is_short() -> None:
    """A method that needs no credential accepts only messages that fit into one flow-control window."""
    async with serving(ByteBounds(MIB, MIB, MIB)) as (echo, _, _), raw_client(echo.port) as raw:
        stream_id = await raw.call("Many", None)
        raw.h2.send_data(stream_id, bytes(framed(bytes(100_000))[:1000]))
        await raw.flush()
        trailers = await raw.until_ended(stream_id)
        assert trailers["grpc-status"] == str(CODE.RESOURCE_EXHAUSTED.value[0])


async def test_streams_beyond_a_strangers_are_refused_alone() -> None:
    """A connection without an admitted call may have `unauthenticated_calls` open calls. Only the calls beyond this
    number are refused; the other calls continue."""
    limits = http2.ServerLimits(unauthenticated_calls=10)
    async with serving(ByteBounds(MIB, MIB, MIB), limits) as (echo, gate, _), raw_client(echo.port) as raw:
        gate.open.clear()
        ids = [await raw.call("One", b"x", key="a") for _ in range(12)]
        await raw.until_ended(ids[-1])
        gate.open.set()
        assert [(await raw.until_ended(stream_id)).get("grpc-status") for stream_id in ids] == ["0"] * 10 + [None] * 2
        assert gate.asked == 10
        more = [await raw.call("One", b"x", key="a") for _ in range(40)]
        assert {(await raw.until_ended(stream_id))["grpc-status"] for stream_id in more} == {"0"}


async def test_a_decompressed_message_counts() -> None:
    """The size of a decompressed message counts against the budget."""
    bounds = ByteBounds(4 * MIB, 4 * MIB, 4 * MIB)
    packed = gzip.compress(bytes(3 * MIB))
    async with (
        serving(bounds, http2.ServerLimits(max_message_bytes=3 * MIB)) as (echo, _, budget),
        grpc.aio.insecure_channel(echo.address, compression=grpc.Compression.Gzip) as channel,
    ):
        assert len(packed) < WINDOW
        method: Any = channel.stream_unary(f"/{SERVICE}/SlowReader")
        slow = [method(_messages(bytes(3 * MIB)), metadata=(("key", "a"),)) for _ in range(3)]
        back: Any = channel.unary_unary(f"/{SERVICE}/One")
        assert await back(bytes(3 * MIB), metadata=(("key", "a"),)) == bytes(3 * MIB)
        for call in slow:
            call.cancel()
        assert budget.held <= 4 * MIB


async def _messages(message: bytes) -> AsyncIterator[bytes]:
    yield message
    await asyncio.Event().wait()


SIZES = st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 400_000)), min_size=1, max_size=12)


@settings(max_examples=15, deadline=None)
@given(SIZES, st.booleans())
def test_law_all_complete_within_any_budget(calls: list[tuple[str, int]], streaming: bool) -> None:
    """Any set of calls over one connection completes, even if the budget holds only about one message."""

    async def play() -> None:
        async with serving(ByteBounds(300_000, 400_000, 500_000)) as (echo, _, budget):
            async with grpc.aio.insecure_channel(echo.address) as channel, asyncio.timeout(60):
                method: Any = channel.unary_unary(f"/{SERVICE}/One")
                back: Any = channel.stream_stream(f"/{SERVICE}/Back")

                async def call(tenant: str, size: int) -> int:
                    metadata = (("key", tenant),)
                    if not streaming:
                        return len(await method(bytes(size), metadata=metadata))
                    stream = back(_three(bytes(size)), metadata=metadata)
                    return sum([len(message) async for message in stream]) // 3

                got = await asyncio.gather(*(call(tenant, size) for tenant, size in calls))
                assert got == [size for _, size in calls]
            assert (budget.held, budget.waiting) == (0, 0)

    asyncio.run(play())


async def _three(message: bytes) -> AsyncIterator[bytes]:
    for _ in range(3):
        yield message
