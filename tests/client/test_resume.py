"""The SDK resumes a stream after the loss of the gateway, and the caller reads every part of the text exactly once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.client import AsyncClient, AsyncStream, Client, HeadraceError
from cluster.client.resume import MAX_FAILURES, Resumption
from cluster.gateway.server import Gateway
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from tests.gateway.conftest import bundle, checkpoint
from tests.support.cluster import TestCluster, running_cluster, sim_engine, until
from tests.support.cuttable import cuttable

pytestmark = pytest.mark.slow

__all__ = ["bundle", "checkpoint"]


@dataclass
class Pair:
    """Two gateways that have the same secret and the same worker."""

    first: TestCluster
    second: TestCluster

    @property
    def endpoints(self) -> list[str]:
        """The gRPC endpoints of the first and the second gateway."""
        return [cluster.gateway.endpoints["grpc"] for cluster in (self.first, self.second)]


@pytest.fixture
async def pair(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Pair]:
    """Two gateways, and a worker that is connected to both gateways."""
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path / "cache"))
    async with running_cluster(tmp_path / "a") as first, running_cluster(tmp_path / "b") as second:
        links = [cluster.gateway.endpoints["link"] for cluster in (first, second)]
        worker = await first.add_worker(sim_engine(checkpoint, decode_ms=5), bundle, gateways=links)
        second.workers.append(worker)
        await until(lambda: second.linked(worker.identity.worker_id), "the worker has dialled both")
        yield Pair(first, second)


def kill(gateway: Gateway) -> None:
    """Reset all client connections of a gateway and close its listener, which has the effect of a killed process."""
    clients = gateway.ports.clients
    assert clients._listener is not None
    clients._listener.close()
    for connection in list(clients.connections):
        connection.transport.abort()


@pytest.mark.slow
async def test_streams_outlive_their_gateway(pair: Pair) -> None:
    """After a gateway is killed, plain streams and session streams continue on the other gateway.

    Each stream yields the text of an undisturbed stream, and the usage at the end. New calls go to the other gateway.
    """
    async with AsyncClient(pair.endpoints) as client:
        wanted = [
            (await client.chat("sim", f"call {i}", max_tokens=120, ignore_eos=True, temperature=0.0)).text
            for i in range(4)
        ]
        read = [0] * 4

        async def read_stream(i: int) -> str:
            stream = client.stream_chat("sim", f"call {i}", max_tokens=120, ignore_eos=True, temperature=0.0)
            async for _ in stream:
                read[i] += 1
            assert stream.usage is not None
            assert (stream.usage.completion_tokens, stream.finish_reason) == (120, "length")
            return stream.text

        running = [asyncio.create_task(read_stream(i)) for i in range(4)]
        await until(lambda: min(read) >= 10, "all streams have begun")
        kill(pair.first.gateway)
        assert await asyncio.gather(*running) == wanted
        assert client._calls.gateways.endpoint == pair.endpoints[1]
        assert (await client.chat("sim", "call 0", max_tokens=120, ignore_eos=True, temperature=0.0)).text == wanted[0]


@pytest.mark.slow
async def test_blocking_code_too(pair: Pair) -> None:
    """A stream of the blocking client is resumed too, and the text of every choice is received exactly once."""
    begun = threading.Event()

    def read_twice() -> tuple[dict[int, str], dict[int, str]]:
        with Client(",".join(pair.endpoints)) as client:
            raw = client.chat("sim", "hello", max_tokens=100, ignore_eos=True, temperature=0.7, seed=3, n=2).raw
            stream = client.stream_chat("sim", "hello", max_tokens=100, ignore_eos=True, temperature=0.7, seed=3, n=2)
            texts = {0: "", 1: ""}
            for number, chunk in enumerate(stream.chunks()):
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content
                if number == 15:
                    begun.set()
            return texts, {choice.index: choice.message.content for choice in raw.choices}

    running = asyncio.create_task(asyncio.to_thread(read_twice))
    await asyncio.to_thread(begun.wait, 20)
    kill(pair.first.gateway)
    texts, wanted = await running
    assert texts == wanted


@pytest.mark.slow
async def test_a_connection_that_carries_nothing_is_left(pair: Pair) -> None:
    """If a connection becomes silent without being closed (a pulled cable), the client notices it within seconds.

    The plain stream and the session stream of the connection then continue on the other gateway, long before the
    kernel's timeout.
    """
    async with cuttable(pair.endpoints[0]) as relay, AsyncClient([relay.address, pair.endpoints[1]]) as client:
        wanted = (await client.chat("sim", "Once", max_tokens=400, ignore_eos=True, temperature=0.0)).text
        streams = [
            client.stream_chat("sim", "Once", max_tokens=400, ignore_eos=True, temperature=0.0) for _ in range(2)
        ]
        for stream in streams:
            await anext(stream)
        for way in (way for ways in relay.ways for way in ways):
            way.cut()

        async def read_to_end(stream: AsyncStream[pb.ChatChunk]) -> str:
            async for _ in stream:
                pass
            return stream.text

        async with asyncio.timeout(60):
            assert await asyncio.gather(*map(read_to_end, streams)) == [wanted, wanted]


@pytest.mark.slow
async def test_a_gateway_that_stops_is_left(pair: Pair) -> None:
    """When a gateway stops gracefully, its stream continues on the other gateway, with the same text."""
    async with AsyncClient(pair.endpoints) as client:
        wanted = (await client.complete("sim", "Once", max_tokens=120, ignore_eos=True, temperature=0.0)).text
        stream = client.stream_complete("sim", "Once", max_tokens=120, ignore_eos=True, temperature=0.0)
        await anext(stream)
        stopping = asyncio.create_task(pair.first.gateway.stop(0.05))
        async for _ in stream:
            pass
        assert stream.text == wanted
        await stopping


@pytest.mark.slow
async def test_the_next_connection_is_there_before_it_is_needed(pair: Pair) -> None:
    """While a stream still runs on a draining gateway, the client already connects to the other gateway.

    Both gateways are addresses of one endpoint name.
    """
    clients = pair.second.gateway.ports.clients
    async with AsyncClient(["ipv4:" + ",".join(pair.endpoints)]) as client:
        wanted = (await client.complete("sim", "Once", max_tokens=300, ignore_eos=True, temperature=0.0)).text
        assert not clients.connections
        stream = client.stream_complete("sim", "Once", max_tokens=300, ignore_eos=True, temperature=0.0)
        await anext(stream)
        stopping = asyncio.create_task(pair.first.gateway.stop(0.5))
        await until(lambda: bool(clients.connections), "the client has connected to the second gateway", 5)
        assert pair.first.gateway.service.busy, "the stream has not been handed over yet"
        async for _ in stream:
            pass
        assert stream.text == wanted
        await stopping


async def test_it_can_be_turned_off(pair: Pair) -> None:
    """With `resume=False`, chunks have no resume token, and the loss of the gateway raises HeadraceError."""
    async with AsyncClient(pair.endpoints, resume=False) as client:
        stream = client.stream_chat("sim", "hello", max_tokens=300, ignore_eos=True)
        chunks = stream.chunks()
        assert not (await anext(chunks)).resume_token
        kill(pair.first.gateway)
        with pytest.raises(HeadraceError, match="UNREACHABLE"):
            async for _ in chunks:
                pass
        resumable = client.stream_chat("sim", "hello", max_tokens=5, resumable=True)
        assert (await anext(resumable.chunks())).resume_token


def test_what_a_whole_token_says_need_not_be_kept() -> None:
    """A whole resume token replaces all tokens before it. So a resume request has only the newest whole token and the
    tokens after it."""
    resumption = Resumption(pb.ChatRequest(model="m"), None, 1)
    for number, whole in enumerate([False, False, True, False, True, False], start=1):
        resumption.record(pb.ChatChunk(resume_token=b"%d" % number, offset=number, resume_token_whole=whole))
    request = resumption.resume_request
    assert request is not None
    assert (list(request.resume_tokens), request.offset) == ([b"5", b"6"], 6)


def test_tries_are_bounded_and_the_deadline_stays() -> None:
    """A stream is retried up to MAX_FAILURES times with growing pauses, and never after the stream's deadline.

    Received text resets the number of failures.
    """
    now = 100.0
    resumption = Resumption(pb.ChatRequest(model="m"), 60.0, 1, clock=lambda: now)
    lost = HeadraceError("UNREACHABLE", "connection reset", code="UNAVAILABLE")
    assert resumption.pause_s(HeadraceError("UNREACHABLE", "failed to connect to all", code="UNAVAILABLE")) is None
    piece = pb.ChatChunk(resume_token=b"t", offset=1, choices=[pb.ChoiceDelta()])
    assert resumption.record(pb.ResumeChunk(chat=piece)) == piece
    pauses = [resumption.pause_s(lost) for _ in range(MAX_FAILURES)]
    assert pauses == [0.0, *sorted(p for p in pauses[1:] if p is not None)]
    assert resumption.pause_s(lost) is None
    assert resumption.record(pb.ChatChunk(resume_token=b"u", offset=2)) is None
    assert resumption.pause_s(lost) is None, "a token alone is no progress"
    resumption.record(piece)
    assert resumption.pause_s(HeadraceError("RATE_LIMITED", "", code="RESOURCE_EXHAUSTED", retry_after_s=1.0)) is None
    assert resumption.pause_s(lost) == 0.0
    assert resumption.pause_s(HeadraceError("RATE_LIMITED", "", code="RESOURCE_EXHAUSTED", retry_after_s=1.0)) == 1.0
    assert resumption.pause_s(HeadraceError("RESUME_EXPIRED", "", code="FAILED_PRECONDITION")) is None
    request = resumption.resume_request
    assert request is not None
    assert (list(request.resume_tokens), request.chat.model) == ([b"t", b"u", b"t"], "m")
    now = 159.95
    assert resumption.remaining_s == pytest.approx(0.05)
    assert resumption.pause_s(lost) is None
