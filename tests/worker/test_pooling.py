"""Pooling requests on a worker: over a link, in a drain, after the loss of a gateway, and in the accounts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from cluster.api.output_parts import OutputPart
from cluster.api.pooling import PoolingInfo, PoolingOptions, PoolingTask
from cluster.api.types import EngineRequest, FinishReason, Sampling, TokenOutput
from cluster.gateway.links.worker_link import LinkStream, SubmittedRequest, WorkerLink
from cluster.wire.bundle import Bundle
from cluster.wire.ended_requests import EndedUsage
from cluster.worker.engine.simulated.engine import SimConfig, SimEngine
from cluster.worker.engine.simulated.vectors import pooled
from cluster.worker.parsing.output_parser import OutputParser
from cluster.worker.parsing.port import ParserNames
from cluster.worker.replica import OpenedModel, Replica, ReplicaPlacement
from cluster.worker.settings import ReplicaSettings
from tests.support.serving import Door, eventually, open_door
from tests.worker.test_replica import settings

CONFIG = SimConfig(vocab=1000, max_model_len=512, decode_ms=1, embed_dimensions=48, max_num_seqs=4)
EMBED = PoolingOptions(PoolingTask.EMBED)


@dataclass
class Pooled:
    """Sink of a pooling request, which collects its outputs and its end."""

    outputs: list[TokenOutput] = field(default_factory=list)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    last_token_at: float = 0.0

    def accepted(self) -> None:
        """Implements `Sink.accepted`."""

    def refused(self, reason: str, message: str, field: str) -> None:
        """Implements `Sink.refused`."""
        self.refusals.append((reason, field))
        self.ended.set()

    def token(self, token_id: int, now: float) -> None:
        """Fail: a pooling request has no tokens."""
        raise AssertionError(f"token {token_id}")

    def parsed_token(self, token_id: int, parts: Sequence[OutputPart], now: float) -> None:
        """Fail: a pooling request has no tokens."""
        raise AssertionError(f"token {token_id}")

    def output(self, output: TokenOutput) -> None:
        """Implements `Sink.output`."""
        self.outputs.append(output)
        if output.finish is not None:
            self.ended.set()

    def lost(self, why: str) -> None:
        """Implements `Sink.lost`."""
        self.losses.append(why)
        self.ended.set()

    def failed(self, error: BaseException) -> None:
        """Implements `Sink.failed`."""
        raise error

    async def end(self) -> TokenOutput:
        """Wait for the end of the request and return its only output."""
        async with asyncio.timeout(60):
            await self.ended.wait()
        (output,) = self.outputs
        return output


@dataclass
class Accounts(Door):
    """A Door (the gateway's end of the links) that records the usage of ended requests."""

    keeps_accounts: bool = True
    records: list[EndedUsage] = field(default_factory=list)

    def usage(self, link: WorkerLink, ended: Sequence[EndedUsage]) -> None:
        """Keep the usage of ended requests."""
        self.records += ended
        link.box.usage_acks([usage.key for usage in ended])


class Gate:
    """A clock for a simulated engine, with which a test can stop the engine: a step ends only while `open` is set."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()

    def now(self) -> float:
        """Return monotonic seconds."""
        return time.monotonic()

    async def sleep_until(self, at: float) -> None:
        """Wait until the gate is open. The time `at` has no effect."""
        await self.open.wait()


def request(*ids: int) -> EngineRequest:
    """Return a pooling request without an id. The worker sets the id."""
    return EngineRequest("", ids or (5, 6, 7), Sampling(max_tokens=1), pooling=EMBED)


@asynccontextmanager
async def serving(
    door: Door, engine: SimEngine, place: ReplicaPlacement | None = None, parser: OutputParser | None = None
) -> AsyncIterator[tuple[Replica, WorkerLink]]:
    """Run a replica of the engine, linked to `door`."""
    opened = OpenedModel(engine, Bundle({}), "", parser=parser)

    def opener(settings: ReplicaSettings) -> OpenedModel:
        return opened

    replica = Replica(settings(door), place or ReplicaPlacement("r1", "n"), opener)
    await replica.start()
    try:
        yield replica, await door.worker("m")
    finally:
        await replica.stop(within_s=5)


async def test_a_vector_over_the_link(door: Door) -> None:
    """The gateway gets the worker's pooling tasks, and each request's vector with its counts. A request for generated
    tokens is refused."""
    async with serving(door, SimEngine(CONFIG)) as (_, link):
        assert link.info.pooling == PoolingInfo((PoolingTask.EMBED,), 48)
        assert "pools:embed" in link.info.capabilities
        prompts = [(5, 6, 7), (8,), tuple(range(5, 305))]
        sinks = [Pooled() for _ in prompts]
        for ids, sink in zip(prompts, sinks, strict=True):
            link.submit(SubmittedRequest(request(*ids)), sink)
        for ids, sink in zip(prompts, sinks, strict=True):
            output = await sink.end()
            assert output.vector == pooled(request(*ids), CONFIG)
            assert (output.finish, list(output.token_ids), output.prompt_tokens) == (FinishReason.STOP, [], len(ids))
        generation = Pooled()
        link.submit(SubmittedRequest(EngineRequest("", (5,), Sampling(max_tokens=3))), generation)
        await generation.ended.wait()
        assert generation.refusals == [("UNSUPPORTED_FEATURE", "model")]
        assert link.running == 0


async def test_a_pooling_model_has_no_parsers(door: Door) -> None:
    """The worker of a pooling model reports no parser and starts no parser process, even if the model's family has a
    parser."""

    async def start() -> None:
        raise AssertionError("the parser's process was started")

    parser = OutputParser(ParserNames("hermes", ""), start)  # type: ignore[arg-type]
    async with serving(door, SimEngine(CONFIG), parser=parser) as (_, link):
        assert not link.parsers
        sink = Pooled()
        link.submit(SubmittedRequest(request()), sink)
        assert (await sink.end()).vector


async def test_a_drain_waits_for_a_vector(door: Door) -> None:
    """If a replica is stopped while it computes a vector, it ends only after it has sent the vector."""
    gate = Gate()
    engine = SimEngine(CONFIG, gate)
    async with serving(door, engine) as (replica, link):
        gate.open.clear()
        sink, before = Pooled(), engine.statistics().submitted
        link.submit(SubmittedRequest(request()), sink)
        await eventually(lambda: engine.statistics().submitted > before, "the engine has the request")
        stopping = asyncio.create_task(replica.stop())
        await eventually(lambda: not link.takes_new_requests, "the worker drains")
        assert not sink.ended.is_set()
        assert not stopping.done()
        gate.open.set()
        assert (await sink.end()).vector == pooled(request(), CONFIG)
        await stopping


async def test_a_request_of_a_lost_gateway_is_not_kept(door: Door) -> None:
    """When a link ends, a pooling request on it is aborted in the engine. It is not kept for a resume, even if it has a
    stream name: the gateway sends the text again to another worker."""
    gate = Gate()
    engine = SimEngine(CONFIG, gate)
    async with serving(door, engine) as (replica, link):
        gate.open.clear()
        sink = Pooled()
        before = engine.statistics()
        link.submit(SubmittedRequest(request(), stream=LinkStream("stream")), sink)
        await eventually(lambda: engine.statistics().submitted > before.submitted, "the engine has the request")
        link.close("the test ends it")
        await eventually(lambda: sink.losses, "the gateway has lost it")
        await eventually(lambda: engine.statistics().aborted > before.aborted, "the engine has aborted it")
        assert replica.end is not None
        assert replica.end.statistics().detached == 0
        gate.open.set()
        again = Pooled()
        (await door.worker("m")).submit(SubmittedRequest(request(), stream=LinkStream("stream", 1)), again)
        output = await again.end()
        assert (output.vector, output.origin_lost) == (pooled(request(), CONFIG), False)


async def test_usage_counts_the_prompt_alone() -> None:
    """The usage of a pooling request has its prompt tokens, no generated tokens, and the GPU time of its step."""
    accounts = Accounts()
    async with (
        open_door(door=accounts),
        serving(accounts, SimEngine(CONFIG), ReplicaPlacement("r1", "n", gpus=1)) as (_, link),
    ):
        sinks = [Pooled() for _ in range(3)]
        for number, sink in enumerate(sinks):
            submitted = SubmittedRequest(request(*range(5, 45 + 100 * number)), sealed_record=b"record %d" % number)
            link.submit(submitted, sink)
        for sink in sinks:
            await sink.end()
        await eventually(lambda: len(accounts.records) >= 3, "the usage has come")
        records = sorted((usage for usage in accounts.records if usage.sealed), key=lambda usage: usage.sealed)
        assert [usage.prompt_tokens for usage in records] == [40, 140, 240]
        assert {(usage.generated_tokens, usage.written_tokens, usage.outcome) for usage in records} == {(0, 0, "ok")}
        assert all(usage.gpu_seconds > 0 for usage in records)


async def test_an_error_has_no_vector(door: Door) -> None:
    """If the engine computes NaN for a text, the gateway gets an error without a vector."""
    engine = SimEngine(CONFIG)
    async with serving(door, engine) as (_, link):
        engine.faults.arm("step", "nan")
        sink = Pooled()
        link.submit(SubmittedRequest(request()), sink)
        output = await sink.end()
        assert (output.finish, output.vector) == (FinishReason.ERROR, None)


@pytest.mark.parametrize("task", ["", "plan", "EMBED"])
async def test_an_unknown_task_is_refused(door: Door, task: str) -> None:
    """A Submit with a task that this worker does not know is refused, and the link stays open."""
    async with serving(door, SimEngine(CONFIG)) as (_, link):
        sink, after = Pooled(), Pooled()
        slot = link.submit(SubmittedRequest(request()), sink)
        link.box._submits[-1].pooling.task = task
        assert slot
        link.submit(SubmittedRequest(request()), after)
        assert (await after.end()).vector
        assert [reason for reason, _ in sink.refusals] == ["INTERNAL"]
