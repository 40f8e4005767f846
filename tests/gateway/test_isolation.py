"""Isolation of calls. An exception in one call affects no link, no other call and no other usage record."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.api.outcomes import Outcome
from cluster.api.ports import Engine, EngineRefused
from cluster.api.types import EngineRequest, Grammar, Sampling
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.sequences.owner import CallEvents
from cluster.gateway.calls.sequences.sequence import OutputSequence
from cluster.gateway.links.worker_link import SubmittedRequest, WorkerLink
from cluster.gateway.text.detokenizer import TextSource
from cluster.gateway.text.tokenizer import TextModel
from cluster.gateway.usage.accounting import Accounting
from cluster.ledger.usage.records import OpenRecord, UsageRecord
from cluster.ledger.usage.sealed_records import Sealer
from cluster.policy.tenants.policy import TenantPolicy
from cluster.wire.bundle import Bundle
from cluster.worker.engine.simulated.engine import SimEngine
from tests.gateway.links.test_prefill_pacing import Silent, linked
from tests.support.calls import complete
from tests.support.cluster import TestCluster, sim_engine, until

pytestmark = pytest.mark.slow

PLAIN = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)


class Broken(Exception):
    """The exception that the faulty parts raise."""


def breaks(*_: object) -> Any:
    """Raise the exception Broken."""
    raise Broken


class PanicException(BaseException):
    """A stand-in for the exception PanicException, which a Rust extension raises after a panic."""


@dataclass
class FaultyText:
    """A wrapper of a text source that fails in one method."""

    plain: TextSource
    at: str
    error: type[BaseException] = Broken
    searches_text: bool = True
    refused: bool = False
    pushes: int = 0
    token_ids: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.token_ids = self.plain.token_ids

    @property
    def pending_chars(self) -> int:
        """The value of the wrapped text source."""
        return self.plain.pending_chars

    def _fail(self, name: str) -> None:
        if name == self.at:
            raise self.error

    def pending_tokens(self) -> int:
        """Fail, or call the same method of the wrapped text source."""
        self._fail("pending_tokens")
        return self.plain.pending_tokens()

    def push(self, token_ids: Sequence[int], stop_terminated: bool = False) -> str | None:
        """Fail at the first call or at later calls, as `at` demands; otherwise call the same method of the wrapped text
        source."""
        self.pushes += 1
        self._fail("push" if self.pushes == 1 else "push later")
        return self.plain.push(token_ids, stop_terminated)

    def text_of(self, token_id: int) -> str:
        """Call the same method of the wrapped text source."""
        return self.plain.text_of(token_id)

    def push_back(self, text: str) -> None:
        """Call the same method of the wrapped text source."""
        self.plain.push_back(text)

    def pop_text(self, finished: bool) -> str:
        """Fail, or call the same method of the wrapped text source."""
        self._fail("pop_text")
        return self.plain.pop_text(finished)

    def restore(self, token_ids: Sequence[int], chars: int) -> None:
        """Call the same method of the wrapped text source."""
        self.plain.restore(token_ids, chars)


@dataclass
class Poison:
    """A fault that is put into one step of a call."""

    sampling: Sampling = PLAIN
    request: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    error: type[BaseException] = Broken
    call: Mapping[str, Any] = field(default_factory=dict)
    handle: str = ""
    listener: bool = False
    outcome: Outcome | None = Outcome.INTERNAL


POISONS = {
    "grammar is no text": Poison(replace(PLAIN, grammar=Grammar("regex", "\ud800"))),
    "choice is no text": Poison(replace(PLAIN, grammar=Grammar("choice", ("a", "\udfff")))),
    "no such grammar": Poison(replace(PLAIN, grammar=Grammar("nonsense", "x"))),
    "salt is no text": Poison(request={"cache_salt": "\ud800"}),
    "traceparent is no text": Poison(request={"traceparent": "\ud800"}),
    "adapter is no text": Poison(request={"adapter": 0}),
    "prompt beyond 32 bits": Poison(request={"prompt_token_ids": [1 << 40]}),
    "prompt below zero": Poison(request={"prompt_token_ids": [-1]}),
    "seed beyond 64 bits": Poison(replace(PLAIN, seed=1 << 70)),
    "stop id beyond 32 bits": Poison(replace(PLAIN, stop_token_ids=(1 << 40,))),
    "bias of a word": Poison(replace(PLAIN, logit_bias={3: cast(float, "much")})),
    "max_tokens below zero": Poison(replace(PLAIN, max_tokens=-1)),
    "handle is no text": Poison(handle="\ud800"),
    "text fails at the first token": Poison(text="push"),
    "text fails at a later token": Poison(text="push later"),
    "text panics": Poison(text="push later", error=PanicException),
    "turns fail at the first token": Poison(call={"began": breaks}),
    "breakers fail at the first token": Poison(call={"answered": breaks}),
    "the listener fails": Poison(listener=True),
}


EVENTS = ("requeue", "began", "answered", "worker_failed", "resumed", "submission_refused", "hedge_ended")


@dataclass
class Rig:
    """A cluster with one worker. Its calls bypass the checks of the APIs."""

    cluster: TestCluster
    text: TextModel

    def call(self, poison: Poison, ids: Sequence[int] = (11, 12, 13)) -> Call:
        """Create a call with this fault, in the same way as CallService creates calls."""
        scheduler = self.cluster.gateway.scheduler
        events = SimpleNamespace(**{**{name: getattr(scheduler.events, name) for name in EVENTS}, **poison.call})
        call = Call(
            id=f"poison-{id(poison)}-{id(object())}",
            model="sim",
            policy=TenantPolicy("alpha", handle=poison.handle),
            rank=0,
            arrived=self.cluster.gateway.service.clock(),
            deadline=None,
            clock=self.cluster.gateway.service.clock,
            events=cast("CallEvents[Any]", events),
            request_id="poison",
        )
        request = EngineRequest("", list(ids), poison.sampling)
        text: TextSource = self.text.detokenizer(list(ids), stop=(), min_tokens=0)
        if poison.text:
            text = FaultyText(text, poison.text, poison.error)
        call.sequences.append(OutputSequence(call, 0, replace(request, **poison.request), text))
        if poison.listener:
            call.output.listen(breaks)
        return call

    @asynccontextmanager
    async def entered(self, calls: Sequence[Call]) -> AsyncIterator[None]:
        """Queue these calls. At the end of the context, close each call as CallService does."""
        scheduler = self.cluster.gateway.scheduler
        model = self.cluster.gateway.directory.find("sim")
        assert model is not None
        try:
            for call in calls:
                scheduler.enter(call, model)
            yield
        finally:
            for call in calls:
                scheduler.leave(call)
                if scheduler.host.accounting is not None:
                    scheduler.host.accounting.ended(call, Outcome.INTERNAL)

    def held(self) -> object:
        """Return everything that the gateway and the link hold for calls. Before and after a test it must be equal."""
        scheduler, (link,) = self.cluster.gateway.scheduler, self.cluster.gateway.hub.links
        order = scheduler.charges.fair.order("sim").statistics()
        return (
            link.running,
            link.slots.prefill_tokens,
            (link.pacing.resumed_tokens, link.pacing.new_tokens),
            scheduler.queues.waiting("sim"),
            scheduler.breakers.open,
            (order.waiting, order.open_charges),
            sum(one.queued_requests for one in scheduler.queues.tally.classes("sim", 0.0, True)),
        )


@asynccontextmanager
async def rig_of(cluster: TestCluster, bundle: Bundle, engine: Engine) -> AsyncIterator[Rig]:
    """Provide a test bed: a cluster with one worker that runs this engine. Afterwards check that the worker's link was
    not lost, that all its credit is free, and that the gateway keeps nothing of the calls."""
    worker = await cluster.add_worker(engine, bundle)
    await cluster.stub.Complete(complete(max_tokens=2))
    await cluster.until_idle()
    rig = Rig(cluster, TextModel.from_bundle(bundle))
    (link,) = cluster.gateway.hub.links
    room, before = link.free, rig.held()
    yield rig
    await cluster.until_idle()
    assert cluster.gateway.hub.links == [link], "the link was lost"
    await until(lambda: rig.held() == before, f"nothing is held: {rig.held()} was {before}")
    await until(
        lambda: link.free.sequences == room.sequences and abs(link.free.tokens - room.tokens) * 10 < room.tokens,
        f"the room is given back, tokens to a tenth: {link.free} was {room}",
    )
    assert worker.end.statistics().running == 0


def ended(call: Call) -> bool:
    """Return whether a call has ended."""
    return call.error is not None or call.output.finished


@pytest.mark.parametrize("places", [8, 1], ids=["unqueued", "queued"])
async def test_no_exception_of_one_call_reaches_a_link(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle, places: int
) -> None:
    """No exception of one call ends a link. Formerly a lone surrogate in a regex ended a link, and with it the streams
    of other tenants."""
    async with rig_of(cluster, bundle, sim_engine(checkpoint, decode_ms=2, max_num_seqs=places)) as rig:
        alone = (await cluster.stub.Complete(complete(max_tokens=60, ignore_eos=True))).choices[0].text
        stream = asyncio.ensure_future(cluster.stub.Complete(complete(max_tokens=60, ignore_eos=True)))
        await until(lambda: any(w.engine.load().running for w in cluster.workers), "a bystander runs")
        calls = {name: rig.call(poison) for name, poison in POISONS.items()}
        healthy = rig.call(Poison())
        async with rig.entered([*calls.values(), healthy]):
            for name, call in calls.items():
                await until(lambda call=call: ended(call), f"the call has ended: {name}")  # type: ignore[misc]
                assert call.error is not None, name
                assert call.error.outcome is POISONS[name].outcome, (name, call.error)
            await until(lambda: ended(healthy), "a call behind them is served")
            assert healthy.error is None
        assert (await stream).choices[0].text == alone, "another's stream was touched"


class FaultySealer:
    """A sealer that fails."""

    def seal(self, record: OpenRecord) -> bytes:
        """Raise the exception Broken."""
        raise Broken

    def open(self, sealed: bytes) -> OpenRecord:
        """Never called."""
        raise NotImplementedError


async def test_a_record_that_cannot_be_sealed_ends_its_call(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle, tmp_path: Path
) -> None:
    """If the usage record of a call cannot be sealed or sent, only this call ends. Formerly such a record ended the
    link and left the call's account open."""
    written: list[UsageRecord] = []
    for number, sealer in enumerate((cast(Sealer, FaultySealer()), Sealer([b"s" * 32]))):
        accounting = Accounting(
            incarnation="g", sealer=sealer, folder=tmp_path / f"spool{number}", insert=written.extend
        )
        async with rig_of(cluster, bundle, sim_engine(checkpoint, decode_ms=2)) as rig:
            cluster.gateway.dispatch.accounting = accounting
            call = rig.call(Poison(request={"cache_salt": "\ud800"}))
            async with rig.entered([call]):
                await until(lambda: call.error is not None, "it has ended")  # noqa: B023
                assert call.error is not None
                assert call.error.outcome is Outcome.INTERNAL
            assert len(accounting.accounts) == 0
            cluster.gateway.dispatch.accounting = None
        await cluster.workers.pop().stop()
        await accounting.stop()
    assert written == []


@pytest.mark.parametrize("at", ["pop_text", "pending_tokens"])
async def test_every_step_of_a_calls_end_is_taken(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle, at: str
) -> None:
    """All cleanup steps of a call run, even if reading or counting the call's text raises an error. Formerly the slot
    and the queue entry were not freed."""
    async with rig_of(cluster, bundle, sim_engine(checkpoint, decode_ms=2)) as rig:
        call = rig.call(Poison(text=at))
        async with rig.entered([call]):
            await until(lambda: bool(call.sequences[0].emitted), "it has a token")
            with pytest.raises(Broken) if at == "pop_text" else nullcontext():
                call.output.pop_pieces()


@dataclass
class FaultyEngine:
    """A simulated engine that fails on requests with a certain seed."""

    inner: SimEngine
    error: Callable[[], BaseException]
    seed: int = 13

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def submit(self, request: EngineRequest) -> None:
        """Implements `Engine.submit`."""
        if request.sampling.seed == self.seed:
            raise self.error()
        await self.inner.submit(request)


@pytest.mark.parametrize(
    "error",
    [Broken, ValueError, lambda: KeyError("x"), PanicException, lambda: EngineRefused("INTERNAL", "\ud800" * 9999)],
    ids=["exception", "ValueError", "KeyError", "panic", "no text"],
)
async def test_an_engine_that_fails_on_a_request_refuses_that_one(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle, error: Callable[[], BaseException]
) -> None:
    """If the engine raises an exception in `submit`, only that request is refused. Formerly the exception ended the
    worker's reader and the link."""
    engine = FaultyEngine(sim_engine(checkpoint, decode_ms=2), error)
    async with rig_of(cluster, bundle, cast(Engine, engine)) as rig:
        grammar = Grammar("regex", "a*")  # requests with a grammar are submitted beside the reader
        poisons = [rig.call(Poison(replace(PLAIN, seed=13, grammar=kind))) for kind in (None, grammar)]
        healthy = rig.call(Poison())
        async with rig.entered([*poisons, healthy]):
            for call in poisons:
                await until(lambda call=call: call.error is not None, "it is refused")  # type: ignore[misc]
                assert call.error is not None
                assert call.error.outcome is Outcome.INTERNAL
            await until(lambda: ended(healthy), "a call beside them is served")
            assert healthy.error is None


def test_a_link_outlives_its_sinks() -> None:
    """When a link ends, all sinks are notified, even if one of them raises an exception."""

    class Raises(Silent):
        failure: BaseException | None = None

        def lost(self, why: str) -> None:
            raise Broken

        def failed(self, error: BaseException) -> None:
            self.failure = error

    class Hears(Silent):
        why = ""

        def lost(self, why: str) -> None:
            self.why = why

    link: WorkerLink = linked()
    raises, hears = Raises(), Hears()
    for sink in (raises, hears):
        link.submit(SubmittedRequest(EngineRequest("", [5], PLAIN)), sink)
    link.end("gone")
    assert hears.why == "gone"
    assert isinstance(raises.failure, Broken)
