"""Tests of resume claims. A call runs in one place only: a resume ends the earlier stream of the call, and workers run
only its newest generation. The tests also check which resumes are charged for the prompt."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.resume_tokens.claim import MOST_RESUMPTIONS, ResumeClaim, ResumeClaims, ResumeTerms
from cluster.gateway.resume_tokens.token_chain import CallHead, Maker, TokenChain
from cluster.ledger.rows import UsageQuery
from cluster.ledger.usage.records import UsageRecord
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from cluster.wire.dial import read
from cluster.worker.resume_generations import ResumeGenerations
from tests.support.calls import Answer, chat, refused, rest_of, resume, text_of
from tests.support.cluster import TestCluster, Worker, running_cluster, sim_engine, until
from tests.support.cuttable import Cuttable, cuttable
from tests.support.keyed import Keyed, bearer, eventually, keyed_cluster, keyed_text

NAMED = "the-call"


@dataclass
class Rig:
    """Two gateways with one ledger, and two workers that are linked to both gateways."""

    keyed: Keyed
    gateways: list[TestCluster]
    workers: list[Worker]
    key: str
    relay: Cuttable
    """The link of the first worker to the first gateway, which the test can cut."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """gRPC metadata of the caller."""
        return (*bearer(self.key), ("x-request-id", NAMED))

    def running(self) -> int:
        """Return the number of requests that run in the engines."""
        return sum(worker.engine.load().running for worker in self.workers)

    def submitted(self) -> int:
        """Return the number of requests that were submitted to the engines."""
        return sum(worker.engine.statistics().submitted for worker in self.workers)  # type: ignore[attr-defined]

    async def begin(self, request: Any, chunks: int) -> tuple[Any, list[Any]]:
        """Start a stream at the first gateway. Returns the stream and its first chunks."""
        call = self.gateways[0].stub.StreamChat(request, metadata=self.metadata)
        return call, [await asyncio.wait_for(read(call), 60) for _ in range(chunks)]

    def resume(self, gateway: int, request: Any, chunks: Sequence[Any]) -> Any:
        """Resume a stream at a gateway, after these chunks."""
        return self.gateways[gateway].stub.Resume(resume(request, chunks), metadata=self.metadata)

    async def records(self, count: int) -> list[UsageRecord]:
        """Wait until `count` usage records of the call are written, and return these records."""
        found: list[UsageRecord] = []

        async def written() -> bool:
            found[:] = [r for r in self.keyed.ledger.usage.records(UsageQuery()) if r.request_id == NAMED]
            return len(found) >= count

        await eventually(written, f"{count} records are written", 30)
        return found


@asynccontextmanager
async def rig_of(folder: Path, checkpoint: Path, bundle: Bundle, workers: int = 2) -> AsyncIterator[Rig]:
    """Run two gateways with `auth`, and `workers` workers that are connected to both."""
    async with keyed_cluster(folder) as keyed, running_cluster(folder / "other", keyed_text(folder)) as other:
        first = keyed.cluster
        async with cuttable(first.gateway.endpoints["link"]) as relay:
            links = [relay.address, other.gateway.endpoints["link"]]
            both = [await first.add_worker(sim_engine(checkpoint, decode_ms=3), bundle, gateways=links)]
            links[0] = first.gateway.endpoints["link"]
            for _ in range(workers - 1):
                both.append(await first.add_worker(sim_engine(checkpoint, decode_ms=3), bundle, gateways=links))
            for worker in both:
                await until(lambda: other.linked(worker.identity.worker_id), "it has dialled both")  # noqa: B023
            key = await keyed.key("acme", models=["*"])
            await eventually(lambda: _knows(other, key), "the other gateway knows the key")
            yield Rig(keyed, [first, other], both, key, relay)


async def _knows(cluster: TestCluster, key: str) -> bool:
    try:
        await cluster.stub.ListModels(pb.ListModelsRequest(), metadata=bearer(key))
    except grpc.aio.AioRpcError:
        return False
    return True


def lasting(tokens: int = 600) -> Any:
    """Return a resumable request for many tokens."""
    return chat("Tell me " + "a long story " * 8, max_tokens=tokens, ignore_eos=True, resumable=True)


async def error_of(call: Any) -> Answer:
    """Return the error that ends a stream."""
    return await asyncio.wait_for(refused(rest_of(call)), 60)


@pytest.mark.slow
@pytest.mark.parametrize("gateway", [0, 1], ids=["the same gateway", "another"])
async def test_a_resumption_ends_the_reader_before_it(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, gateway: int
) -> None:
    """When a client resumes a call whose first stream is still open, the first stream ends with CANCELLED. (In an
    earlier version both streams ran to the end, and only one was charged.)"""
    async with rig_of(tmp_path, checkpoint, bundle) as rig:
        request = lasting()
        whole = await rest_of(rig.gateways[0].stub.StreamChat(request, metadata=bearer(rig.key)))
        call, chunks = await rig.begin(request, 12)
        onward = rig.resume(gateway, request, chunks[:5])
        resumed = [(await asyncio.wait_for(read(onward), 60)).chat]
        answer = await error_of(call)
        assert (answer.code, "resumed elsewhere" in answer.message) == (grpc.StatusCode.CANCELLED, True)
        await until(lambda: rig.running() == 1, "one generation runs")
        resumed += [one.chat for one in await rest_of(onward)]
        assert text_of(chunks[:5]) + text_of(resumed) == text_of(whole)
        assert resumed[-1].usage.completion_tokens == 600
        records = await rig.records(2)
        assert [r.prompt_tokens for r in records] == [resumed[-1].usage.prompt_tokens] * 2
        if gateway == 0:  # tokens generated before are delivered again, and not charged again
            assert sum(r.completion_tokens for r in records) <= 600


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
async def test_one_generation_and_every_prompt_is_paid(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, seed: int
) -> None:
    """However often a call is resumed, only one copy of it runs, and each computed prompt is charged. This holds for
    random cancels and resumes at two gateways, each resume with the first few of the resume tokens. Formerly, resumes
    with different numbers of tokens gave 22 running copies for the price of one prompt."""
    rng = random.Random(seed)
    async with rig_of(tmp_path, checkpoint, bundle) as rig:
        request = lasting(2000)
        before = rig.submitted()
        call, chunks = await rig.begin(request, 12)
        calls = [call]
        for _ in range(6):
            if rng.random() < 0.5:
                calls[-1].cancel()
            call = rig.resume(rng.randrange(2), request, chunks[: rng.randint(1, len(chunks))])
            try:
                for _ in range(rng.randint(2, 6)):
                    await asyncio.wait_for(read(call), 60)
                calls.append(call)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:  # the prefix was used before
                    raise
            await until(lambda: rig.running() <= 1, "one generation runs")
        for call in calls:
            call.cancel()
        for cluster in rig.gateways:
            await cluster.until_idle()
        records = await rig.records(len(calls))
        prompt = max(r.prompt_tokens for r in records)
        unanswered = [r for r in records if not r.generated_tokens]  # cancelled before its worker's first token
        assert sum(r.prompt_tokens for r in records) >= prompt * (rig.submitted() - before - len(unanswered))


@pytest.mark.slow
async def test_a_lost_gateways_prompt_is_paid_once(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """If a call is resumed after the loss of its gateway, the prompt is charged only once for both streams. If the call
    is then resumed again, from an earlier chunk, the prompt is charged a second time."""
    async with rig_of(tmp_path, checkpoint, bundle, workers=1) as rig:
        request = lasting(400)
        call, chunks = await rig.begin(request, 12)
        for way in [one for ways in rig.relay.ways for one in ways]:
            way.cut()
        rig.relay.sever()
        worker = rig.workers[0].end
        await until(lambda: worker.statistics().links == 1, "the first gateway is lost to the worker")
        onward = rig.resume(1, request, chunks[:8])
        assert (await asyncio.wait_for(read(onward), 60)).chat
        assert (await asyncio.wait_for(read(onward), 60)).chat
        onward.cancel()
        await rig.gateways[1].until_idle()
        call.cancel()
        assert sorted(r.prompt_tokens > 0 for r in await rig.records(2)) == [False, True]
        await asyncio.wait_for(rest_of(rig.resume(1, request, chunks[:4])), 60)
        assert sorted(r.prompt_tokens > 0 for r in await rig.records(3)) == [False, True, True]


@pytest.mark.slow
async def test_what_a_gateway_gives_up_is_resumed_free(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """If a gateway stops, its stream is resumed at another gateway without a second charge for the prompt."""
    async with rig_of(tmp_path, checkpoint, bundle) as rig:
        request = lasting(400)
        call, chunks = await rig.begin(request, 6)
        rig.gateways[0].gateway.service.close("stopping")
        rig.gateways[0].gateway.service.end_all()
        assert (await error_of(call)).reason == "NO_WORKER"
        await asyncio.wait_for(rest_of(rig.resume(1, request, chunks)), 60)
        records = await rig.records(2)
        assert sorted(r.prompt_tokens > 0 for r in records) == [False, True]


class Kept:
    """Store of first claims in memory, for all gateways of a test."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    async def claim_first(self, name: str, expires_s: float) -> bool:
        """Implements `FirstClaims.claim_first`."""
        await asyncio.sleep(0)
        new = name not in self.names
        self.names.add(name)
        return new


def chain(last: int, maker: Maker) -> TokenChain:
    """Return a token chain of one call. `last`: number of the last token. `maker`: the gateway that made that token."""
    head = CallHead("c", "r", "t", "s", "m", "d", "p")
    return TokenChain(head=head, maker=maker, last=last.to_bytes(16, "big"), number=last)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(0, 3)), min_size=1, max_size=20))
def test_generations_only_rise(shown: list[tuple[bool, int, int]]) -> None:
    """Two gateways claim resumes of one call at the same time, with tokens of several generations. Every accepted
    resume gets a new generation, higher than the generation of the presented tokens. Among the resumes with tokens of
    one generation, at most one gets its prompt for free."""

    async def run() -> None:
        kept = Kept()
        gateways = [ResumeClaims(kept, name) for name in ("a", "b")]
        asked = [gateways[at].claim(chain(last, Maker("lost", generation)), 60.0) for at, last, generation in shown]
        claims = await asyncio.gather(*asked, return_exceptions=True)
        won = [(g, claim) for (_, _, g), claim in zip(shown, claims, strict=True) if isinstance(claim, ResumeClaim)]
        assert len({claim.generation for _, claim in won}) == len(won)
        assert all(claim.generation > generation for generation, claim in won)
        for generation in range(4):
            assert sum(g == generation and claim.terms is not ResumeTerms.PAID for g, claim in won) <= 1

    asyncio.run(run())


async def test_who_pays() -> None:
    """A client pays for a resume if it left a gateway that still serves. The resume is free if that gateway gave the
    call up. It is also free if the gateway is lost."""
    kept = Kept()
    mine = ResumeClaims(kept, "a")
    assert (await mine.claim(chain(1, Maker("a")), 60.0)).terms is ResumeTerms.PAID
    assert (await mine.claim(chain(2, Maker("b", 1)), 60.0)).terms is ResumeTerms.IF_ALIVE
    await mine.give_up("c", 2, 60.0)
    assert (await mine.claim(chain(3, Maker("a", 2)), 60.0)).terms is ResumeTerms.FREE
    assert (await mine.claim(chain(4, Maker("")), 60.0)).terms is ResumeTerms.FREE, "an older release's"


class Held(Kept):
    """A store of first claims that holds back its answers until three claims have been sent to it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0
        self._enough = asyncio.Event()

    async def claim_first(self, name: str, expires_s: float) -> bool:
        """Implements `FirstClaims.claim_first`."""
        self.sent += 1
        if self.sent == 3:
            self._enough.set()
        await self._enough.wait()
        return await super().claim_first(name, expires_s)


async def test_a_claim_waits_for_the_store_once() -> None:
    """The first resume of a call claims several names in the store. All claims are sent before the store answers the
    first, so the resume waits for the store only once."""
    store = Held()
    async with asyncio.timeout(10):
        assert (await ResumeClaims(store, "a").claim(chain(1, Maker("b")), 60.0)).generation == 1
    assert store.sent == 3


async def test_tokens_that_were_presented_before_claim_nothing() -> None:
    """A second resume with the same tokens is refused and stores no further claim."""
    kept = Kept()
    claims = ResumeClaims(kept, "a")
    await claims.claim(chain(1, Maker("b")), 60.0)
    names = set(kept.names)
    for _ in range(3):
        with pytest.raises(Exception, match="resumed from here already"):
            await claims.claim(chain(1, Maker("b")), 60.0)
    assert kept.names == names


async def test_it_cannot_be_resumed_for_ever() -> None:
    """A call can be resumed at most MOST_RESUMPTIONS times from tokens with the same generation (number of earlier
    resumes). A closed call cannot be resumed at all."""
    claims = ResumeClaims(Kept(), "a")
    for last in range(MOST_RESUMPTIONS):
        await claims.claim(chain(last, Maker("a")), 60.0)
    with pytest.raises(Exception, match="too often"):
        await claims.claim(chain(99, Maker("a")), 60.0)
    closed = ResumeClaims(Kept(), "a")
    await closed.close("c", 3, 60.0)
    with pytest.raises(Exception, match="too often"):
        await closed.claim(chain(1, Maker("a", 3)), 60.0)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4))), st.sampled_from("abc"), st.integers(0, 4))
def test_a_worker_runs_nothing_that_is_outdated(takeovers: list[tuple[str, int]], call: str, generation: int) -> None:
    """A worker runs only the newest generation of a call, in whatever order the takeovers of the call reach it."""
    generations = ResumeGenerations()
    for name, number in takeovers:
        generations.record(name, number)
    newest = max([number for name, number in takeovers if name == call], default=0)
    assert generations.is_outdated(f"{call}#0", generation) is (generation < newest)
    small = ResumeGenerations(most=2)
    for number in range(9):
        small.record(str(number), 1)
    assert len(small) == 2
