"""Streams of the asyncio client that share a session give the same answers and errors as plain streams.

The client also handles old connections, gateways without sessions, and gateways that stop.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.client import AsyncClient, HeadraceError
from cluster.client.options import ChannelOptions
from cluster.client.session import MAX_BATCH_BYTES
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import inference_pb2_grpc
from cluster.wire.bundle import Bundle
from tests.gateway.conftest import bundle, checkpoint, cluster
from tests.support.cluster import LOOPBACK, TestCluster, running_cluster, sim_engine, until
from tests.support.scripted_gateway import WORDS, ScriptedGateway

pytestmark = pytest.mark.slow

__all__ = ["bundle", "checkpoint", "cluster"]


@pytest.fixture
async def client(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> AsyncIterator[AsyncClient]:
    """An asyncio client that is connected to a cluster with one worker."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=3), bundle)
    async with AsyncClient(cluster.gateway.endpoints["grpc"]) as client:
        yield client


async def test_many_streams_share_a_session(client: AsyncClient, cluster: TestCluster) -> None:
    """Twenty concurrent streams share one session. Each stream has its usage, and gets the same text as if the call
    were made alone."""
    alone = (await client.chat("sim", "call 3", max_tokens=25, ignore_eos=True, temperature=0.0)).text

    async def read_stream(i: int) -> tuple[str, int]:
        stream = client.stream_chat("sim", f"call {i}", max_tokens=25, ignore_eos=True, temperature=0.0)
        text = "".join([t async for t in stream])
        assert text == stream.text
        assert stream.usage is not None
        assert stream.finish_reason == "length"
        assert stream.model == "sim"
        return text, stream.usage.completion_tokens

    answers = await asyncio.gather(*(read_stream(i) for i in range(20)))
    assert answers[3][0] == alone
    assert {count for _, count in answers} == {25}
    assert len(client._calls.sessions._running) == 1
    assert client._calls.streams == 0
    await cluster.until_idle()


class Counting(inference_pb2_grpc.InferenceServicer):
    """Servicer that answers nothing. It records two numbers for each session message: the message's size, and how many
    calls the message starts."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.bytes: list[int] = []

    async def Session(self, request_iterator: AsyncIterator[pb.SessionRequest], context: Any) -> Any:
        """Read and record messages until the client disconnects."""
        async for message in request_iterator:
            self.starts.append(sum(request.HasField("start") for request in (message, *message.more)))
            self.bytes.append(message.ByteSize())
        yield pb.SessionEvents()


async def test_calls_that_begin_together_go_together() -> None:
    """Calls that are started together are sent in as few messages as the size limit allows."""
    counting = Counting()  # type: ignore[abstract]
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(counting, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        prompts = ["short"] * 100 + ["long " * (MAX_BATCH_BYTES // 16)] * 5

        async def first(prompt: str) -> None:
            async for _ in client.stream_chat("sim", prompt):
                return

        tasks = [asyncio.create_task(first(prompt)) for prompt in prompts]
        await until(
            lambda: sum(counting.starts) >= len(prompts) - 1, "all calls have arrived"
        )  # the first call has a plain stream
        assert len(counting.starts) <= 10
        assert max(counting.starts) > 50
        assert max(counting.bytes) < MAX_BATCH_BYTES + 1024 < 64 << 10
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await server.stop(0)


async def test_chunks_of_a_session_are_chunks(client: AsyncClient) -> None:
    """In a session, too, `chunks()` yields API messages, and each message has the call's id and model."""
    first = client.stream_chat("sim", "a", max_tokens=30, ignore_eos=True)
    second = client.stream_complete("sim", "b", max_tokens=10, ignore_eos=True)
    chunks = [c async for c in second.chunks()]
    assert "".join(c.choices[0].text for c in chunks) == second.text != ""
    assert {(c.id, c.model) for c in chunks} == {(second.id, "sim")}
    first.cancel()


async def test_errors_are_each_calls_own(client: AsyncClient, cluster: TestCluster) -> None:
    """An invalid call in a session raises the same error as an invalid single call, and other calls are not affected.

    Cancelled calls and dropped calls end at the gateway.
    """
    running = client.stream_chat("sim", "a", max_tokens=60, ignore_eos=True)
    with pytest.raises(HeadraceError) as caught:
        [t async for t in client.stream_chat("nope", "b")]
    assert (caught.value.reason, caught.value.code) == ("MODEL_NOT_FOUND", "NOT_FOUND")
    with pytest.raises(HeadraceError) as caught:
        [t async for t in client.stream_chat("sim", "b", temperature=-1.0)]
    assert [v.field for v in caught.value.violations] == ["temperature"]
    with pytest.raises(HeadraceError) as caught:
        [t async for t in client.stream_chat("sim", "c", max_tokens=2000, ignore_eos=True, timeout_s=0.2)]
    assert caught.value.reason == "DEADLINE_EXCEEDED"
    async with client.stream_chat("sim", "d", max_tokens=2000, ignore_eos=True) as cancelled:
        await anext(cancelled)
    dropped = client.stream_chat("sim", "e", max_tokens=2000, ignore_eos=True)
    await anext(dropped)
    del dropped
    gc.collect()
    assert len([t async for t in running]) > 0
    await cluster.until_idle()


@pytest.mark.slow
async def test_old_sessions_are_replaced(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """New calls go to another session after a session's connection has reached the maximum age, and no call is lost.
    Sessions that have ended are forgotten."""
    config = LOOPBACK.replace("drain_timeout_s: 0", "drain_timeout_s: 20\n  max_connection_age_s: 0.5")
    async with running_cluster(tmp_path, config) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=3), bundle)
        async with AsyncClient(cluster.gateway.endpoints["grpc"]) as client:

            async def count_tokens(i: int) -> int:
                stream = client.stream_chat("sim", f"{i}", max_tokens=40, ignore_eos=True)
                async for _ in stream:
                    pass
                assert stream.usage is not None
                return stream.usage.completion_tokens

            sessions, seen = client._calls.sessions, set[object]()
            for wave in range(12):
                assert set(await asyncio.gather(*(count_tokens(wave * 8 + i) for i in range(8)))) == {40}
                seen |= sessions._running
            assert len(seen) > 1
            await until(lambda: len(sessions._running) <= 1, "the old sessions are forgotten")


@pytest.mark.parametrize("how", ["cancel", "close"])
async def test_readers_of_cancelled_streams_get_an_error(client: AsyncClient, cluster: TestCluster, how: str) -> None:
    """A stream that is cancelled, or whose client is closed, ends its reader at once with the error CANCELLED, in a
    session and alone. Nothing is started again. A reader's own cancellation stays a CancelledError."""
    streams = [client.stream_chat("sim", f"{i}", max_tokens=2000, ignore_eos=True) for i in range(3)]
    for stream in streams:
        await anext(stream)
    readers = [asyncio.create_task(_text(stream)) for stream in streams]
    stopped = asyncio.create_task(_text(client.stream_chat("sim", "stopped", max_tokens=2000, ignore_eos=True)))
    await until(lambda: client._calls.streams == 4, "all streams have begun")
    stopped.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopped
    if how == "close":
        await client.close()
    else:
        for stream in streams:
            stream.cancel()
    async with asyncio.timeout(10):
        for result in await asyncio.gather(*readers, return_exceptions=True):
            assert isinstance(result, HeadraceError)
            assert result.reason == result.code == "CANCELLED"
    await cluster.until_idle()
    assert client._calls.streams == 0
    assert how == "cancel" or not client._calls.sessions._running


async def test_a_request_that_is_too_large_ends_alone(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A gateway ends a session whose message exceeds its limit. The session's other streams go on without a loss."""
    config = LOOPBACK.replace("drain_timeout_s: 0", "drain_timeout_s: 0\n  max_message_bytes: 65536")
    async with running_cluster(tmp_path, config) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=3, max_model_len=4096), bundle)
        async with AsyncClient(cluster.gateway.endpoints["grpc"]) as client:
            options: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True, "temperature": 0.0}
            alone = (await client.chat("sim", "1", **options)).text
            streams = [client.stream_chat("sim", "1", **options) for _ in range(3)]
            begun = [await anext(stream) for stream in streams]
            with pytest.raises(HeadraceError) as caught:
                await _text(client.stream_chat("sim", "long " * 20_000, max_tokens=4))
            assert caught.value.code == "RESOURCE_EXHAUSTED"
            rest = await asyncio.gather(*(_text(stream) for stream in streams))
            assert [first + more for first, more in zip(begun, rest, strict=True)] == [alone] * 3


def test_the_time_left_counts_from_the_first_attempt() -> None:
    """A call's deadline does not move when the call is tried at another gateway."""
    options = ChannelOptions(("a:1", "b:1"), timeout_s=5.0)
    left = options.time_left(None)
    first, second = left(), left()
    assert first is not None
    assert second is not None
    assert 0 < second < first <= 5
    assert options.time_left(-1.0)() == 0.001
    assert ChannelOptions(("a:1",), timeout_s=None).time_left(None)() is None


async def test_a_gateway_without_sessions_gets_streams(gateway: ScriptedGateway) -> None:
    """The client uses one plain stream per call if the gateway answers a session with UNIMPLEMENTED."""
    async with AsyncClient(gateway.endpoint) as client:
        streams = [client.stream_chat("tiny", "x") for _ in range(5)]
        texts = await asyncio.gather(*(_text(s) for s in streams))
    assert texts == ["".join(WORDS)] * 5


async def _text(stream: AsyncIterator[str]) -> str:
    return "".join([t async for t in stream])


async def test_lost_gateway(client: AsyncClient, cluster: TestCluster) -> None:
    """When a session's gateway is lost, all calls of the session that cannot be resumed raise HeadraceError."""
    streams = [client.stream_chat("sim", f"{i}", max_tokens=2000, ignore_eos=True, resumable=False) for i in range(4)]
    for stream in streams:
        await anext(stream)
    await cluster.gateway.stop(0)
    for stream in streams:
        with pytest.raises(HeadraceError):
            [t async for t in stream]
    await until(lambda: client._calls.streams == 0, "all streams have ended")
