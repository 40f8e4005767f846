"""Deadlines, cancels and lost clients. They free the engine's slots at once and do not affect other calls."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.api.types import EngineInfo, EngineLoad, EngineRequest, TokenOutput
from cluster.wire.bundle import Bundle
from cluster.wire.dial import read
from cluster.worker.engine.simulated.engine import SimEngine
from tests.support.calls import chat, complete, refused, rest_of, text_of
from tests.support.cluster import TestCluster, sim_engine, until


class StepClock:
    """A wrapper of an engine that records the step in which each request left the engine."""

    def __init__(self, engine: SimEngine) -> None:
        self._engine = engine
        self.left_at: list[int] = []

    async def start(self) -> EngineInfo:
        return await self._engine.start()

    async def submit(self, request: EngineRequest) -> None:
        await self._engine.submit(request)

    async def abort(self, request_ids: Sequence[str]) -> None:
        await self._engine.abort(request_ids)
        self.left_at += [self._engine.load().steps] * len(request_ids)

    async def step(self) -> Sequence[TokenOutput]:
        return await self._engine.step()

    def load(self) -> EngineLoad:
        return self._engine.load()

    async def check(self) -> None:
        await self._engine.check()

    async def close(self) -> None:
        await self._engine.close()


@pytest.mark.slow
async def test_a_thousand_cancels_free_their_places(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """At 20 ms a step, the slot of a cancelled call is free within two steps (p99 of 1,000 cancels). Other calls lose
    no tokens."""
    engine = StepClock(sim_engine(checkpoint, decode_ms=20, max_num_seqs=256, kv_blocks=2_000))
    await cluster.add_worker(engine, bundle)
    steady = chat("steady", max_tokens=150, ignore_eos=True)
    alone = text_of([c async for c in cluster.stub.StreamChat(steady)])

    async def neighbour() -> str:
        return text_of([c async for c in cluster.stub.StreamChat(steady)])

    neighbours = [asyncio.create_task(neighbour()) for _ in range(8)]
    steps: list[int] = []

    async def begun(i: int) -> Any:
        call = cluster.stub.StreamChat(chat(f"call {i}", max_tokens=1000, ignore_eos=True))
        await read(call)
        return call

    for wave in range(40):
        calls = await asyncio.gather(*(begun(wave * 25 + i) for i in range(25)))
        step, before = engine.load().steps, len(engine.left_at)
        for call in calls:
            call.cancel()
        await until(lambda n=before + 25: len(engine.left_at) == n, "the engine has dropped them")  # type: ignore[misc]
        steps += [left - step for left in engine.left_at[before:]]
    assert len(steps) == 1000
    assert sorted(steps)[989] <= 2, sorted(steps)[-20:]
    assert set(await asyncio.gather(*neighbours)) == {alone}
    await cluster.until_idle()


@pytest.mark.slow
async def test_a_thousand_cancels_at_once(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """A thousand waiting and running calls that are cancelled together leave nothing behind."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=5, max_num_seqs=32), bundle)
    calls = [cluster.stub.StreamChat(chat(f"call {i}", max_tokens=500, ignore_eos=True)) for i in range(1000)]
    await until(lambda: sum(cluster.gateway.service.statistics().values()) >= 900, "the calls are under way")
    for call in calls:
        call.cancel()
    await cluster.until_idle()
    answer = await cluster.stub.Chat(chat(max_tokens=4, ignore_eos=True))
    assert answer.usage.completion_tokens == 4


@pytest.mark.parametrize("queued", [False, True], ids=["running", "queued"])
async def test_deadlines_reach_the_engine(cluster: TestCluster, checkpoint: Path, bundle: Bundle, queued: bool) -> None:
    """A call past its deadline ends with DEADLINE_EXCEEDED, and leaves the queue and the engine."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=5, max_num_seqs=1), bundle)
    others = []
    if queued:
        others = [cluster.stub.StreamChat(chat(max_tokens=2000, ignore_eos=True)) for _ in range(4)]
        await until(lambda: cluster.gateway.scheduler.queues.waiting("sim")[0] >= 1, "a call waits")
    answer = await refused(cluster.stub.StreamChat(chat(max_tokens=2000, ignore_eos=True), timeout=0.3))
    assert answer.code is grpc.StatusCode.DEADLINE_EXCEEDED
    for other in others:
        other.cancel()
    await cluster.until_idle()
    counted = cluster.gateway.metrics._counters["requests_total"]
    assert counted[("sim", "default", "grpc", "deadline_exceeded")] == 1


async def test_client_gone_in_mid_stream(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """If a client's connection breaks, the slots of all its streams are freed."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=5), bundle)
    channel = grpc.aio.insecure_channel(
        cluster.gateway.endpoints["grpc"], options=[("grpc.use_local_subchannel_pool", 1)]
    )
    stub = type(cluster.stub)(channel)
    calls = [stub.StreamChat(chat(max_tokens=2000, ignore_eos=True)) for _ in range(10)]
    for call in calls:
        await read(call)
    await channel.close(None)
    await cluster.until_idle()


@pytest.mark.slow
async def test_slow_reader_gets_whole_text_in_fewer_chunks(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """A client that does not read for a time gets all text in fewer and larger chunks. The engine does not wait for the
    client."""
    worker = await cluster.add_worker(
        sim_engine(checkpoint, decode_ms=0.2, max_model_len=4_000, kv_blocks=4_000), bundle
    )
    request = complete(max_tokens=2_000, ignore_eos=True)
    expected = (await cluster.stub.Complete(request)).choices[0].text
    channel = grpc.aio.insecure_channel(
        cluster.gateway.endpoints["grpc"],
        options=[("grpc.use_local_subchannel_pool", 1), ("grpc.http2.lookahead_bytes", 1024)],
    )
    async with channel:
        call = type(cluster.stub)(channel).StreamComplete(request)
        first = await read(call)
        await until(lambda: worker.engine.load().running == 0, "the engine is done though nobody reads", 60)
        chunks = [first, *await rest_of(call)]
    assert "".join(c.choices[0].text for c in chunks) == expected
    assert len(chunks) < 2_000
