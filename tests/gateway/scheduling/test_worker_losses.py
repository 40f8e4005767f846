"""Requests that harm workers. A request that crashes engines takes down at most two of them. A request that is too
large for a link is not queued."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.outcomes import CallError, Outcome
from cluster.api.ports import Engine, EngineDead
from cluster.api.types import EngineRequest, Grammar, Sampling
from cluster.gateway.scheduling.submission import MAX_SUBMIT_BYTES, check_size
from cluster.policy.scheduling.worker_losses import MOST_SILENT, SETTLE_S, WINDOW_S, LossVerdict, WorkerLosses
from cluster.wire.bundle import Bundle
from cluster.wire.codecs.codec import submit_to_pb
from cluster.wire.dial import read
from cluster.worker.engine.simulated.engine import SimEngine
from tests.support.calls import complete, refused, rest_of, resume
from tests.support.cluster import TestCluster, sim_engine, until

DEADLY = 13


@dataclass
class Mortal:
    """A simulated engine that crashes on a request with the seed DEADLY, after `tokens` tokens of the request.

    Before it crashes, it waits until each other running request has got a token from it. If `crash` is given, the
    engine gives no outputs, and crashes once this event is set.
    """

    inner: SimEngine
    tokens: int = 0
    crash: asyncio.Event | None = None
    doomed: dict[str, int] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    """Ids of the other requests that have got no token."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def submit(self, request: EngineRequest) -> None:
        """Implements `Engine.submit`."""
        if request.sampling.seed == DEADLY:
            self.doomed[request.request_id] = len(request.emitted_token_ids)
        else:
            self.silent.add(request.request_id)
        await self.inner.submit(request)

    async def step(self) -> Any:
        """Implements `Engine.step`."""
        outputs = [one for one in await self.inner.step() if self.doomed.get(one.request_id, -1) < self.tokens]
        for one in outputs:
            self.silent.discard(one.request_id)
            if one.request_id in self.doomed:
                self.doomed[one.request_id] += len(one.token_ids)
        is_due = self.crash.is_set() if self.crash else not self.silent
        if is_due and any(count >= self.tokens for count in self.doomed.values()):
            raise EngineDead("a query of death")
        return [] if self.crash else outputs


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [0, 5], ids=["at its prompt", "after some tokens"])
async def test_a_query_of_death_takes_two_workers(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle, tokens: int
) -> None:
    """A request that crashes its engine takes down two workers, not `max_attempts` workers with all their streams."""
    for _ in range(4):
        await cluster.add_worker(cast(Engine, Mortal(sim_engine(checkpoint, decode_ms=2), tokens)), bundle)
    request = complete(max_tokens=700, ignore_eos=True)
    whole = (await cluster.stub.Complete(request)).choices[0].text
    streams = [asyncio.ensure_future(cluster.stub.Complete(request)) for _ in range(6)]
    await until(lambda: sum(w.engine.load().running for w in cluster.workers) == 6, "bystanders run")
    deadly = complete(max_tokens=99, seed=DEADLY, temperature=1.0, resumable=True)
    chunks: list[Any] = []
    answer = await refused(_kept(cluster.stub.StreamComplete(deadly), chunks))
    assert (answer.code, answer.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")
    assert "lost 2 workers" in answer.message
    assert sum(worker.task.done() for worker in cluster.workers) == MOST_SILENT
    if tokens:  # no resume sends the call to a third worker, at whatever gateway
        assert (await refused(cluster.stub.Resume(resume(deadly, chunks)))).reason == "RESUME_EXPIRED"
    assert [(await stream).choices[0].text for stream in streams] == [whole] * 6
    await cluster.until_idle()


@pytest.mark.slow
async def test_no_neighbour_fails_with_a_query_of_death(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """A request that crashes the engine of each worker is ended after the third crash.

    Other streams are hit by the first two crashes, and get no token in between. They still resume and complete.
    """
    await cluster.add_worker(cast(Engine, Mortal(sim_engine(checkpoint, decode_ms=2))), bundle)
    request = complete(max_tokens=300, ignore_eos=True)
    whole = (await cluster.stub.Complete(request)).choices[0].text
    streams = [cluster.stub.StreamComplete(request) for _ in range(3)]
    firsts = [(await read(stream)).choices[0].text for stream in streams]
    deadly = asyncio.ensure_future(
        refused(cluster.stub.Complete(complete(max_tokens=99, seed=DEADLY, temperature=1.0)))
    )
    await until(lambda: cluster.workers[0].task.done(), "the first worker is lost")
    crash = asyncio.Event()
    second = await cluster.add_worker(cast(Engine, Mortal(sim_engine(checkpoint, decode_ms=2), crash=crash)), bundle)
    await until(lambda: second.engine.load().running == 4, "all have been sent to the second worker")
    crash.set()
    await until(second.task.done, "the second worker is lost")
    for _ in range(3):
        await cluster.add_worker(cast(Engine, Mortal(sim_engine(checkpoint, decode_ms=2))), bundle)
    answer = await deadly
    assert answer.reason == "WORKER_LOST"
    assert "lost 3 workers" in answer.message
    assert sum(worker.task.done() for worker in cluster.workers) == 3
    rests = [await rest_of(stream) for stream in streams]
    texts = ["".join(chunk.choices[0].text for chunk in rest if chunk.choices) for rest in rests]
    assert [first + text for first, text in zip(firsts, texts, strict=True)] == [whole] * 3
    await cluster.until_idle()


async def _kept(call: Any, chunks: list[Any]) -> None:
    while (chunk := await read(call)) is not None:
        chunks.append(chunk)


@pytest.mark.slow
async def test_general_losses_are_no_calls_fault(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """If many workers are lost at once, a stream that ran on two of the lost workers still resumes."""
    for _ in range(2):
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=400), bundle)
    call = cluster.stub.StreamComplete(complete(max_tokens=12, ignore_eos=True))
    first = await read(call)
    others = [await cluster.add_worker(sim_engine(checkpoint), bundle, model="other") for _ in range(3)]
    for _ in range(2):
        (running,) = [w for w in cluster.workers if not w.task.done() and w.end.statistics().running]
        await running.stop()
        await until(
            lambda: (
                cluster.gateway.scheduler.queues.waiting("sim")[0] == 1
                or any(w.end.statistics().running for w in cluster.workers if not w.task.done())
            ),
            "the stream waits or runs on another worker",
        )
    for worker in others:
        await worker.stop()
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
    chunks = [first, *await rest_of(call)]
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-1].usage.resumed >= 1


def test_a_broken_connection_is_no_lost_worker() -> None:
    """A worker whose process reconnects within SETTLE_S does not count as lost."""
    for came_back, verdict in ((False, LossVerdict.END), (True, LossVerdict.RESUME)):
        losses = WorkerLosses()
        losses.lost("a", 0.0, "ia")
        losses.lost("b", 1.0, "ib")
        if came_back:
            losses.returned("ib")
        assert losses.verdict(["a", "b"], 1.0, 1.0 + SETTLE_S) is verdict


@given(
    own=st.sets(st.integers(0, 9), min_size=MOST_SILENT, max_size=5),
    others=st.lists(st.tuples(st.integers(10, 99), st.floats(0, 2 * WINDOW_S)), max_size=12),
)
def test_a_sequence_is_blamed_for_what_others_do_not_share(own: set[int], others: list[tuple[int, float]]) -> None:
    """A sequence that lost workers may have caused the losses. It waits for SETTLE_S, until other losses at the same
    time are known. Then it resumes only if most of the lost workers did not run it."""
    losses = WorkerLosses()
    now = 2 * WINDOW_S
    for link, at in sorted(others, key=lambda one: one[1]):
        losses.lost(str(link), at)
    for link in own:
        losses.lost(str(link), now)
    mine = [str(link) for link in own]
    assert losses.verdict(mine, now, now + SETTLE_S / 2) is LossVerdict.WAIT
    shared = sum(at + WINDOW_S >= now + SETTLE_S for _, at in others)
    assert losses.verdict(mine, now, now + SETTLE_S) is (LossVerdict.RESUME if shared > len(own) else LossVerdict.END)


REQUESTS = st.builds(
    Sampling,
    max_tokens=st.just(1),
    stop_token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=50).map(lambda ids: tuple(ids * 900)),
    logit_bias=st.dictionaries(st.integers(0, 2**31), st.floats(-100, 100), max_size=9),
    grammar=st.none() | st.builds(Grammar, st.just("regex"), st.text(max_size=99).map(lambda text: text * 1500)),
)


@given(sampling=REQUESTS, ids=st.lists(st.integers(0, 9), max_size=9), salt=st.sampled_from(["", "s" * 150_000]))
def test_no_large_request_is_queued(sampling: Sampling, ids: list[int], salt: str) -> None:
    """A request that is too large for a link is refused before it is queued. Formerly, a request with 16 million stop
    token ids blocked five workers in turn."""
    request = EngineRequest("", ids, sampling, cache_salt=salt)
    size = submit_to_pb(1, 1, EngineRequest("", [], sampling, cache_salt=salt)).ByteSize()
    if size <= MAX_SUBMIT_BYTES:
        check_size(request)
    if size > MAX_SUBMIT_BYTES + 100:
        with pytest.raises(CallError) as refused_with:
            check_size(request)
        assert refused_with.value.outcome is Outcome.INVALID_FIELD
        assert refused_with.value.violations[0].field in ("stop_token_ids", "response_format", "cache_salt")
