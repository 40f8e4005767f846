"""The SDK reads a stream to its end whatever becomes of the gateway: the text of an undisturbed one, once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.client import AsyncClient, Client, HeadraceError
from cluster.client.aio import AsyncStream
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
    """Two gateways with one secret and one worker."""

    first: TestCluster
    second: TestCluster

    @property
    def endpoints(self) -> list[str]:
        """Of both."""
        return [one.gateway.endpoints["grpc"] for one in (self.first, self.second)]


@pytest.fixture
async def pair(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Pair]:
    """A worker that has dialled both."""
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path / "cache"))
    async with running_cluster(tmp_path / "a") as first, running_cluster(tmp_path / "b") as second:
        links = [one.gateway.endpoints["link"] for one in (first, second)]
        worker = await first.add_worker(sim_engine(checkpoint, decode_ms=5), bundle, gateways=links)
        second.workers.append(worker)
        await until(lambda: second.linked(worker.identity.worker_id), "the worker has dialled both")
        yield Pair(first, second)


def kill(gateway: Gateway) -> None:
    """Its client port as a killed process leaves it: connections reset, nobody listens."""
    clients = gateway._clients
    assert clients is not None
    assert clients._listener is not None
    clients._listener.close()
    for connection in list(clients.connections):
        connection.transport.abort()


@pytest.mark.slow
async def test_streams_outlive_their_gateway(pair: Pair) -> None:
    """A gateway killed under a plain stream and a session's: each reads what it would have read, and usage at its
    end; new calls go to the other gateway."""
    async with AsyncClient(pair.endpoints) as client:
        wanted = [
            (await client.chat("sim", f"call {i}", max_tokens=120, ignore_eos=True, temperature=0.0)).text
            for i in range(4)
        ]
        read = [0] * 4

        async def one(i: int) -> str:
            stream = client.stream_chat("sim", f"call {i}", max_tokens=120, ignore_eos=True, temperature=0.0)
            async for _ in stream:
                read[i] += 1
            assert stream.usage is not None
            assert (stream.usage.completion_tokens, stream.finish_reason) == (120, "length")
            return stream.text

        running = [asyncio.create_task(one(i)) for i in range(4)]
        await until(lambda: min(read) >= 10, "all have begun")
        kill(pair.first.gateway)
        assert await asyncio.gather(*running) == wanted
        assert client._gateways.endpoint == pair.endpoints[1]
        assert (await client.chat("sim", "call 0", max_tokens=120, ignore_eos=True, temperature=0.0)).text == wanted[0]


@pytest.mark.slow
async def test_blocking_code_too(pair: Pair) -> None:
    """The blocking client's stream goes on as well, with every choice once."""
    begun = threading.Event()

    def work() -> tuple[dict[int, str], dict[int, str]]:
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

    running = asyncio.create_task(asyncio.to_thread(work))
    await asyncio.to_thread(begun.wait, 20)
    kill(pair.first.gateway)
    texts, wanted = await running
    assert texts == wanted


@pytest.mark.slow
async def test_a_connection_that_carries_nothing_is_left(pair: Pair) -> None:
    """A cable is pulled, and nobody says so: the client asks, hears nothing, and its streams, a plain one and a
    session's, go on at the other gateway within seconds, not when the kernel gives the connection up."""
    async with cuttable(pair.endpoints[0]) as relay, AsyncClient([relay.address, pair.endpoints[1]]) as client:
        wanted = (await client.chat("sim", "Once", max_tokens=400, ignore_eos=True, temperature=0.0)).text
        streams = [
            client.stream_chat("sim", "Once", max_tokens=400, ignore_eos=True, temperature=0.0) for _ in range(2)
        ]
        for stream in streams:
            await anext(stream)
        for way in (way for ways in relay.ways for way in ways):
            way.cut()

        async def rest(stream: AsyncStream[pb.ChatChunk]) -> str:
            async for _ in stream:
                pass
            return stream.text

        async with asyncio.timeout(12.0):
            assert await asyncio.gather(*map(rest, streams)) == [wanted, wanted]


@pytest.mark.slow
async def test_a_gateway_that_stops_is_left(pair: Pair) -> None:
    """A gateway that ends in order hands its streams on, in time."""
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
    """A name with two addresses: while a stream is under way at a gateway that drains, the other is connected to."""
    clients = pair.second.gateway._clients
    assert clients is not None
    async with AsyncClient(["ipv4:" + ",".join(pair.endpoints)]) as client:
        wanted = (await client.complete("sim", "Once", max_tokens=300, ignore_eos=True, temperature=0.0)).text
        assert not clients.connections
        stream = client.stream_complete("sim", "Once", max_tokens=300, ignore_eos=True, temperature=0.0)
        await anext(stream)
        stopping = asyncio.create_task(pair.first.gateway.stop(0.5))
        await until(lambda: bool(clients.connections), "it has connected", 5)
        assert pair.first.gateway.service.busy, "the stream has not been handed on yet"
        async for _ in stream:
            pass
        assert stream.text == wanted
        await stopping


async def test_it_can_be_turned_off(pair: Pair) -> None:
    """Without it nothing is sealed, and a lost gateway is an error after the text that had come."""
    async with AsyncClient(pair.endpoints, resume=False) as client:
        stream = client.stream_chat("sim", "hello", max_tokens=300, ignore_eos=True)
        chunks = stream.chunks()
        assert not (await anext(chunks)).resume_token
        kill(pair.first.gateway)
        with pytest.raises(HeadraceError, match="UNREACHABLE"):
            async for _ in chunks:
                pass
        own = client.stream_chat("sim", "hello", max_tokens=5, resumable=True)
        assert (await anext(own.chunks())).resume_token


def test_what_a_whole_token_says_need_not_be_kept() -> None:
    """Only those since the newest whole one are shown, with it."""
    kept = Resumption(pb.ChatRequest(model="m"), None, 1)
    for number, whole in enumerate([False, False, True, False, True, False], start=1):
        kept.note(pb.ChatChunk(resume_token=b"%d" % number, offset=number, resume_token_whole=whole))
    asked = kept.resumes
    assert asked is not None
    assert (list(asked.resume_tokens), asked.offset) == ([b"5", b"6"], 6)


def test_tries_are_bounded_and_the_deadline_stays() -> None:
    """A stream is tried again with growing pauses, so often and until its deadline; progress begins the count anew."""
    now = 100.0
    kept = Resumption(pb.ChatRequest(model="m"), 60.0, 1, clock=lambda: now)
    lost = HeadraceError("UNREACHABLE", "connection reset", code="UNAVAILABLE")
    assert kept.pause_s(HeadraceError("UNREACHABLE", "failed to connect to all", code="UNAVAILABLE")) is None
    piece = pb.ChatChunk(resume_token=b"t", offset=1, choices=[pb.ChoiceDelta()])
    assert kept.note(pb.ResumeChunk(chat=piece)) == piece
    pauses = [kept.pause_s(lost) for _ in range(MAX_FAILURES)]
    assert pauses == [0.0, *sorted(p for p in pauses[1:] if p is not None)]
    assert kept.pause_s(lost) is None
    assert kept.note(pb.ChatChunk(resume_token=b"u", offset=2)) is None
    assert kept.pause_s(lost) is None, "a token alone is no progress"
    kept.note(piece)
    assert kept.pause_s(HeadraceError("RATE_LIMITED", "", code="RESOURCE_EXHAUSTED", retry_after_s=1.0)) is None
    assert kept.pause_s(lost) == 0.0
    assert kept.pause_s(HeadraceError("RATE_LIMITED", "", code="RESOURCE_EXHAUSTED", retry_after_s=1.0)) == 1.0
    assert kept.pause_s(HeadraceError("RESUME_EXPIRED", "", code="FAILED_PRECONDITION")) is None
    asked = kept.resumes
    assert asked is not None
    assert (list(asked.resume_tokens), asked.chat.model) == ([b"t", b"u", b"t"], "m")
    now = 159.95
    assert kept.left_s == pytest.approx(0.05)
    assert kept.pause_s(lost) is None
