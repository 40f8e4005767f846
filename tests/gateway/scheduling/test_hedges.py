"""Tests of hedges in a gateway: a sequence whose first token is late is also sent to a second worker.

The first of the two workers to answer keeps the sequence. The gateway then keeps no state of the sequence at the other
worker, whatever happens to the two workers.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.api.types import KV_EVENTS, DrainState, EngineRequest, FinishReason, Sampling, TokenOutput, WorkerIdentity
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.sequences.hedge import Hedge
from cluster.gateway.calls.sequences.life import State
from cluster.gateway.calls.sequences.sequence import OutputSequence
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.scheduling.scheduler import Scheduler
from cluster.gateway.scheduling.service_charges import ServiceCharges
from cluster.gateway.scheduling.worker_events import WorkerEvents
from cluster.gateway.tracing.call_spans import SpanBuilder
from cluster.gateway.tracing.call_trace import SequenceFacts
from cluster.gateway.tracing.tracer import Tracer
from cluster.gateway.usage.call_account import CallAccount
from cluster.ledger.store import Ledger
from cluster.ledger.usage.records import OpenRecord
from cluster.link.v1 import link_pb2 as pb
from cluster.observe import semantic_conventions as names
from cluster.observe.metrics import Metrics
from cluster.policy.fairness.waiting_room import WaitingRoom
from cluster.policy.routing.route_history import Route
from cluster.policy.routing.router import Candidate, RouteCall, RoutingDecision
from cluster.policy.scheduling.first_token_times import MIN_COUNT, RELEARNT_S
from cluster.policy.tenants.policy import TenantPolicy
from cluster.wire.bundle import Bundle
from cluster.wire.codecs.codec import StepColumns
from cluster.wire.ended_requests import EndedUsage
from tests.gateway.tracing.test_call_spans import check_tree, facts
from tests.support.accounts import accounting_cluster, records, start_worker
from tests.support.calls import complete
from tests.support.cluster import LOOPBACK, sim_engine, until
from tests.support.linked_scheduler import Host, PlainText, enters, linked_worker

PROMPT = 20
TTFT_S = 0.2
LEARNT = int(2.2 * MIN_COUNT)
"""Number of calls on two workers after which their times to first token count."""
RUNS = (State.SENT, State.RUNNING, State.RESENT)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """Provide a SQLite ledger with its tables."""
    made = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    made.upgrade()
    yield made
    made.close()


class Gateway(RuleBasedStateMachine):
    """State machine test of a gateway's scheduler with real calls and real links. The rules act as the workers. All
    calls may be hedged."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.serial = itertools.count(1)
        self.metrics = Metrics("test")
        self.charges = ServiceCharges({"standard": 0}, self.metrics)
        room = WaitingRoom(max_requests=9, max_tokens=10_000, max_wait_s=9.0, order_of=self.charges.fair.order)
        self.scheduler = Scheduler(Host(), room, self.charges, self.metrics, self.clock, 5.0, hedging_share=1.0)
        self.events = WorkerEvents(self.scheduler, self.metrics, self.clock)
        self.links: dict[str, WorkerLink] = {}
        self.calls: list[Call] = []
        self.hedges = 0
        self.tracer = Tracer(lambda spans: None, {}, 1.0, clock=self.clock)

    def clock(self) -> float:
        """The virtual time, in seconds."""
        return self.now

    @initialize()
    def learn(self) -> None:
        """Connect two workers, and answer enough calls for the gateway to know when a first token is late. Then open a
        call and let its first token be late."""
        for name in ("w0", "w1"):
            self.link_up(name)
        for number in range(LEARNT):
            key, worker = f"learn{number}", f"w{number % 2}"
            self.scheduler.hedges.policy.sent(key, "m", worker, PROMPT, self.now)
            self.scheduler.hedges.policy.answered(key, PROMPT, self.now + TTFT_S)
        self.now += RELEARNT_S
        self.enter()
        self.time_passes(2 * TTFT_S)
        assert self.calls[0].sequences[0].state is State.HEDGED

    @rule(name=st.sampled_from(["w0", "w1", "w2"]))
    def link_up(self, name: str) -> None:
        """Connect a worker if it is not connected."""
        if name in self.links:
            return
        link = self.links[name] = linked_worker(self.events, name, self.serial)
        credit = pb.Credit(grant_id=next(self.serial), sequences=50, tokens=100_000)
        link.apply(pb.WorkerTurn(seq=next(self.serial), credit=credit))
        self.events.link_changed(link)

    @rule()
    def enter(self) -> None:
        """Open a call."""
        policy = TenantPolicy("a", handle="a")
        call = Call(f"c{next(self.serial)}", "m", policy, 0, self.now, None, self.clock, self.scheduler.events)
        call.trace = self.tracer.begin("", "", self.now)
        assert call.trace is not None
        call.trace.queued()
        call.sequences.append(
            OutputSequence(call, 0, EngineRequest("", [1] * PROMPT, Sampling(max_tokens=9)), PlainText())
        )
        if enters(self.scheduler, call):
            self.calls.append(call)

    @rule(seconds=st.sampled_from([0.01, 2 * TTFT_S, 2.0]))
    def time_passes(self, seconds: float) -> None:
        """Advance the clock. Each call whose first token is late by then is also sent to a second worker."""
        self.now += seconds
        before = {call.id for call in self.calls if call.sequences[0].hedge is not None}
        self.scheduler.hedges.send_late()
        after = {call.id for call in self.calls if call.sequences[0].hedge is not None}
        assert before <= after
        self.hedges += len(after - before)
        self.scheduler.upkeep.expire()

    def slots(self) -> list[tuple[WorkerLink, int, OutputSequence[Any]]]:
        """Return all slots in use at workers: the link, the slot and the sequence."""
        found: list[tuple[WorkerLink, int, OutputSequence[Any]]] = []
        for link in self.links.values():
            for sink in link.slots.sinks:
                if isinstance(sink, Hedge):
                    assert isinstance(sink.sequence, OutputSequence)
                    assert sink.sequence.hedge is sink
                    assert sink.link is link
                    found.append((link, sink.slot, sink.sequence))
                else:
                    assert isinstance(sink, OutputSequence)
                    assert sink.link is link
                    found.append((link, sink.slot, sink))
        return found

    @precondition(lambda self: self.slots())
    @rule(number=st.integers(0, 9), what=st.sampled_from(["token", "token", "finish", "error", "accept", "full", "no"]))
    def message(self, number: int, what: str) -> None:
        """Simulate a worker's message about one request. `what`: the content of the message, for example that the
        request was accepted or refused, or an output. `number`: chooses one of the first four requests. Hedged
        requests, which two workers have, come first, so that the messages of both workers arrive in any order."""
        slots = self.slots()
        slots.sort(key=lambda entry: (entry[2].hedge is None, entry[2].key, entry[0].name))
        link, slot, sequence = slots[number % min(len(slots), 4)]
        turn = pb.WorkerTurn(seq=next(self.serial))
        begins = sequence.state in (State.SENT, State.HEDGED, State.RESENT)
        if what == "accept":
            turn.accepted.add(slot=slot)
        elif what in ("full", "no"):
            if not begins:
                return
            turn.refused.add(slot=slot, reason="NO_ROOM" if what == "full" else "INVALID_FIELD", message="no")
        else:
            finish = {"finish": FinishReason.STOP, "error": FinishReason.ERROR}.get(what)
            counts = (PROMPT, 0) if begins and what != "error" else (None, None)
            columns = StepColumns()
            columns.add(slot, TokenOutput("", [] if what == "error" else [7], finish, None, *counts))
            turn.step.CopyFrom(columns.to_pb())
        was_hedged = sequence.hedge is not None
        link.apply(turn)
        if was_hedged and what in ("token", "finish"):
            assert sequence.hedge is None, "the first output decides"
            assert sequence.emitted == [7]
            assert sequence.life.last_worker == link.identity.incarnation
        elif was_hedged and what in ("error", "full"):
            assert sequence.state is State.SENT, "the other worker has the sequence"
            assert sequence.life.last_worker != link.identity.incarnation

    @precondition(lambda self: self.links)
    @rule(number=st.integers(0, 2), drains=st.booleans())
    def link_lost(self, number: int, drains: bool) -> None:
        """Break the link of a worker. `drains`: whether the worker has announced a drain before."""
        name = sorted(self.links)[number % len(self.links)]
        link = self.links[name]
        hedged = [call for call in self.calls if call.sequences[0].hedge is not None]
        if drains:
            link.drain_state = DrainState.DRAINING
            link.move_requests_at = self.now
            self.time_passes(2.0)
        del self.links[name]
        link.end("lost")
        self.events.link_down(link, "lost")
        for call in hedged:
            assert call.error is None, "the other worker has the sequence"

    @precondition(lambda self: self.calls)
    @rule(number=st.integers(0, 9), how=st.sampled_from(["leave", "fail", "cut"]))
    def end_call(self, number: int, how: str) -> None:
        """End a call. `how`: "leave" (the caller disconnects), "fail" (an operator ends the call) or "cut" (the budget
        is used up)."""
        call = self.calls.pop(number % len(self.calls))
        if how == "cut":
            self.scheduler.cut(call)
        self.scheduler.leave(call)
        self.trace_is_whole(call)

    def trace_is_whole(self, call: Call) -> None:
        """Check that the spans of an ended call form one tree, that its attempts have ended, and that their tokens add
        up to the call's."""
        assert call.trace is not None
        assert all(attempt.ended_at is not None for attempt in call.trace.attempts)
        (sequence,) = call.sequences
        tokens = len(sequence.emitted)
        known = facts(ended_at=self.now, sequences=(SequenceFacts(tokens, sequence.finish_reason),))
        spans = list(SpanBuilder(call.trace, known, {}, lambda at: at).spans())
        check_tree(spans)
        assert sum(int(str(span.attributes.get(names.TOKENS, 0))) for span in spans) == tokens

    @invariant()
    def open_attempts_match_slots(self) -> None:
        """Check that the record of a call has one open attempt for each worker that runs its sequence."""
        for call in self.calls:
            assert call.trace is not None
            open_attempts = [each.worker.incarnation for each in call.trace.attempts if each.ended_at is None]
            links = [link.identity.incarnation for link, _, other in self.slots() if other is call.sequences[0]]
            assert sorted(open_attempts) == sorted(links)

    @invariant()
    def slots_match_states(self) -> None:
        """Check that a hedged sequence has two slots on two workers, any other running sequence one slot, and other
        sequences none."""
        slots = self.slots()
        for call in self.calls:
            (sequence,) = call.sequences
            links = [link for link, _, other in slots if other is sequence]
            state = sequence.state
            assert len(links) == (2 if state is State.HEDGED else 1 if state in RUNS else 0), (state, links)
            assert (sequence.hedge is not None) == (state is State.HEDGED)
            assert len(set(links)) == len(links)
            assert call.error is None or state is State.FAILED
        known = {call.sequences[0].key for call in self.calls}
        assert {sequence.key for _, _, sequence in slots} <= known, "an ended call runs on"
        assert sum(link.running for link in self.links.values()) == len(slots)
        hedged_now = sum(call.sequences[0].hedge is not None for call in self.calls)
        assert self.counted("hedges_total") + hedged_now == self.hedges

    def counted(self, name: str) -> float:
        """Return the sum of a counter's series."""
        return sum(
            sample.value
            for metric in self.metrics.collect()
            for sample in metric.samples
            if sample.name == f"headrace_{name}"
        )

    def teardown(self) -> None:
        """Close all calls, and check that no link, queue or account holds anything."""
        for call in self.calls:
            self.scheduler.leave(call)
            self.trace_is_whole(call)
        self.calls.clear()
        self.slots_match_states()
        order = self.charges.fair.order("m").statistics()
        assert (order.waiting, order.open_charges) == (0, 0)
        assert len(self.scheduler.hedges.policy) == 0
        assert self.scheduler.queues.waiting("m") == (0, 0)
        for link in self.links.values():
            assert (link.running, link.slots.prefill_tokens, link.pacing.new_tokens) == (0, 0, 0)


Gateway.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestGateway = Gateway.TestCase


def test_late_sequences_of_one_worker_are_not_compared_one_by_one() -> None:
    """If no other worker can take a late sequence, the workers are not compared again for the other late sequences of
    the same worker."""
    gateway, looks = Gateway(), 0
    gateway.learn()
    for _ in range(8):
        gateway.enter()
    for link in gateway.links.values():
        link.apply(pb.WorkerTurn(seq=next(gateway.serial), credit=pb.Credit(grant_id=next(gateway.serial))))
        gateway.events.link_changed(link)
    second_worker = gateway.scheduler.hedges.policy.second_worker

    def counted(call: RouteCall, candidates: Iterable[Candidate]) -> RoutingDecision:
        nonlocal looks
        looks += 1
        return second_worker(call, candidates)

    gateway.scheduler.hedges.policy.second_worker = counted  # type: ignore[method-assign]
    before = gateway.hedges
    gateway.time_passes(2 * TTFT_S)
    assert (looks, gateway.hedges) == (2, before)  # the sequences of each of the two workers
    gateway.teardown()


def test_a_hedge_of_a_short_prompt_has_no_prediction() -> None:
    """Cached tokens are predicted for long prompts only. The route of a hedge has no prediction for a short prompt,
    like the route to the first worker."""
    gateway = Gateway()
    gateway.learn()
    for link in gateway.links.values():
        link.info = replace(link.info, capabilities=(KV_EVENTS,))
    gateway.enter()
    gateway.time_passes(2 * TTFT_S)
    (sequence,) = gateway.calls[-1].sequences
    assert sequence.hedge is not None
    assert sequence.route is not None
    assert sequence.route.predicted_cached_tokens is None
    assert sequence.hedge.route.predicted_cached_tokens is None
    gateway.teardown()


# ---- usage


@given(st.booleans(), st.booleans(), st.integers(0, 50), st.integers(1, 50), st.floats(0, 5), st.floats(0, 5))
def test_one_worker_of_a_hedged_sequence_is_counted(
    won: bool, loser_first: bool, in_vain: int, kept: int, wasted_s: float, kept_s: float
) -> None:
    """The usage record of a sequence that was sent to two workers waits for the reports of both, in either order. The
    record has only the counts of the worker that kept the sequence."""
    account = CallAccount(OpenRecord("r", "t", "k", "m", "v1", "q", 0.0, prompt_tokens=PROMPT), b"sealed", awaited=2)
    loser, winner = ("first", "second") if won else ("second", "first")
    account.in_vain.append(loser)
    account.counts = {"outcome": "ok", "completion_tokens": kept, "generated_tokens": kept}
    for incarnation in (loser, winner) if loser_first else (winner, loser):
        assert not account.complete
        tokens, seconds = (in_vain, wasted_s) if incarnation == loser else (kept, kept_s)
        report = EndedUsage(b"sealed", generated_tokens=tokens, cached_tokens=tokens, gpu_seconds=seconds, key=1)
        assert account.apply_report(incarnation, report)
        assert not account.apply_report(incarnation, report)
    assert account.complete
    record = account.close()
    assert record is not None
    assert (record.prompt_tokens, record.generated_tokens, record.cached_tokens) == (PROMPT, kept, min(kept, PROMPT))
    assert record.gpu_seconds == kept_s


def test_the_prediction_is_that_of_the_worker_that_keeps_the_sequence() -> None:
    """The predicted number of cached tokens in the usage record belongs to the worker that reports the real number. If
    a worker continues the sequence, the prediction for the worker before it stays."""
    account = CallAccount(OpenRecord("r", "t", "k", "m", "v1", "q", 0.0, prompt_tokens=PROMPT), b"sealed")
    first, second = (WorkerIdentity(name, f"{name}-1", "m") for name in ("w1", "w2"))
    account.assign(first, Route(0, 0.0, "w1", "cached_prefix", PROMPT, cached={"w1": 960}))
    account.assign(second, Route(0, 0.0, "w2", "cached_prefix", PROMPT, cached={"w1": 960}))
    assert (account.worker, account.predicted_cached_tokens) == (second, 0)
    account.continued = True
    account.assign(first, Route(0, 0.0, "w1", "cached_prefix", PROMPT, cached={"w1": 960}))
    assert (account.worker, account.predicted_cached_tokens) == (first, 0)


@pytest.mark.slow
async def test_a_late_first_token_comes_from_a_second_worker(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, ledger: Ledger
) -> None:
    """A call on a slow worker is answered by another worker. It has one usage record, with the tokens of that worker.

    The slow worker keeps nothing of the call, and the call's explanation shows both decisions.
    """
    text = LOOPBACK + "routing: {hedging: {share: 1}}\n"
    async with accounting_cluster(tmp_path / "g", ledger.usage.insert, text) as cluster:
        gateway = cluster.gateway
        links = [gateway.endpoints["link"]]
        fast = [await start_worker(sim_engine(checkpoint, decode_ms=1), bundle, links) for _ in range(2)]
        await until(lambda: sum(link.free.sequences > 0 for link in gateway.hub.links) == 2, "two workers are linked")
        request, learnt = complete(max_tokens=6, ignore_eos=True), 2 * LEARNT
        whole = (await cluster.stub.Complete(request)).choices[0].text
        await asyncio.gather(*(cluster.stub.Complete(request) for _ in range(learnt)))
        policy = gateway.scheduler.hedges.policy
        await until(lambda: policy.knows("sim", 5, gateway.service.clock()), "it is known when a first token is late")

        engine = sim_engine(checkpoint, decode_ms=60_000)
        slow = await start_worker(engine, bundle, links)
        await until(lambda: sum(link.free.sequences > 0 for link in gateway.hub.links) == 3, "the slow one is linked")
        answers = await asyncio.gather(*(cluster.stub.Complete(request) for _ in range(9)))
        assert [answer.choices[0].text for answer in answers] == [whole] * 9
        await until(lambda: engine.load().running == 0, "the slow engine is free")
        await until(lambda: slow.end.statistics().running == 0, "the slow worker has nothing")
        late = [ended for ended in slow.witness.seen if ended.sealed]
        assert late, "no call was late"
        assert {ended.generated_tokens for ended in late} == {0}

        history = gateway.scheduler.routes.history
        routed = [call.routes for answer in answers for call in history.find(answer.id)]
        hedged = [routes for routes in routed if len(routes) > 1]
        assert len(hedged) == len(late)
        for first, second in hedged:
            assert (first.worker_id, first.first_output_at) == (slow.identity.worker_id, None)
            assert second.again == "late"
            assert second.first_output_at is not None

        accounting = gateway.dispatch.accounting
        assert accounting is not None
        await until(lambda: len(accounting.accounts) == 0, "every account is closed")
        await until(lambda: accounting.statistics().pending == 0, "every record is in the database")
        await until(lambda: not slow.end.statistics().unacked_usage, "the slow worker's reports are acknowledged")
        found = records(ledger)
        assert len(found) == 1 + learnt + 9
        assert {(one.completion_tokens, one.generated_tokens, one.outcome) for one in found} == {(6, 6, "ok")}
        assert {one.worker for one in found} == {one.identity.worker_id for one in fast}
        assert gateway.hub.statistics().running == 0
        assert len(policy) == 0
        for worker in (*fast, slow):
            await worker.stop()
