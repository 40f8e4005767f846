"""Moves of sequences from draining workers: another worker computes a long sequence before the sequence leaves its
worker, so that its stream does not pause. Whatever happens meanwhile, no state is left over."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.api.types import KV_EVENTS, DrainState, EngineRequest, FinishReason, Sampling, TokenOutput
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.sequences.life import State
from cluster.gateway.calls.sequences.sequence import OutputSequence
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.scheduling.moves import LEAST_TOKENS, Preparation
from cluster.gateway.scheduling.scheduler import Scheduler
from cluster.gateway.scheduling.service_charges import ServiceCharges
from cluster.gateway.scheduling.worker_events import WorkerEvents
from cluster.link.v1 import link_pb2 as pb
from cluster.observe.metrics import Metrics
from cluster.policy.fairness.waiting_room import WaitingRoom
from cluster.policy.tenants.policy import TenantPolicy
from cluster.wire.bundle import Bundle
from cluster.wire.codecs.codec import StepColumns
from cluster.wire.dial import read
from tests.support.calls import complete
from tests.support.cluster import TestCluster, sim_engine, until
from tests.support.linked_scheduler import INFO, Host, PlainText, enters, linked_worker

RUNS = (State.SENT, State.RUNNING, State.RESENT)
BLOCK = INFO.block_size


class Gateway(RuleBasedStateMachine):
    """State machine test of moves with a real scheduler, real calls and real links. The rules act as the workers."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.serial = itertools.count(1)
        metrics = Metrics("test")
        self.charges = ServiceCharges({"standard": 0}, metrics)
        room = WaitingRoom(max_requests=9, max_tokens=100_000, max_wait_s=90.0, order_of=self.charges.fair.order)
        self.scheduler = Scheduler(Host(), room, self.charges, metrics, lambda: self.now, 50.0)
        self.events = WorkerEvents(self.scheduler, metrics, lambda: self.now)
        self.links: dict[str, WorkerLink] = {}
        self.calls: list[Call] = []

    @initialize()
    def connect(self) -> None:
        """Connect two workers."""
        for name in ("w0", "w1"):
            self.link_up(name)

    @rule(name=st.sampled_from(["w0", "w1", "w2"]), caches=st.booleans())
    def link_up(self, name: str, caches: bool = True) -> None:
        """Connect a worker if it is not connected. `caches`: whether it reports the blocks of its prefix cache."""
        if name in self.links:
            return
        info = replace(INFO, capabilities=(KV_EVENTS,) if caches else ())
        self.links[name] = linked_worker(self.events, name, self.serial, info=info)
        self.grant(self.links[name], 50)

    def grant(self, link: WorkerLink, sequences: int) -> None:
        """Set the number of requests that the worker has ever accepted to at most `sequences`."""
        credit = pb.Credit(grant_id=next(self.serial), sequences=sequences, tokens=100_000 if sequences else 0)
        link.apply(pb.WorkerTurn(seq=next(self.serial), credit=credit))
        self.events.link_changed(link)

    @rule(tokens=st.sampled_from([20, LEAST_TOKENS, 700]))
    def enter(self, tokens: int) -> None:
        """Open a call whose prompt has this number of tokens."""
        policy = TenantPolicy("a", handle="a")
        call = Call(f"c{next(self.serial)}", "m", policy, 0, self.now, None, lambda: self.now, self.scheduler.events)
        request = EngineRequest("", [1] * tokens, Sampling(max_tokens=900))
        call.sequences.append(OutputSequence(call, 0, request, PlainText()))
        if enters(self.scheduler, call):
            self.calls.append(call)

    @rule(name=st.sampled_from(["w0", "w1", "w2"]), sequences=st.sampled_from([0, 50]))
    def capacity(self, name: str, sequences: int) -> None:
        """Change the capacity of a worker."""
        if (link := self.links.get(name)) is not None:
            self.grant(link, sequences)

    @rule(name=st.sampled_from(["w0", "w1", "w2"]), drains=st.booleans())
    def drain(self, name: str, drains: bool) -> None:
        """Begin or undo the drain of a worker, whose sequences must move now."""
        if (link := self.links.get(name)) is not None:
            link.drain_state = DrainState.DRAINING if drains else DrainState.SERVING
            link.move_requests_at = self.now if drains else float("inf")
            self.events.link_changed(link)

    @rule(seconds=st.sampled_from([0.2, 2.0]))
    def time_passes(self, seconds: float) -> None:
        """Advance the clock and do the periodic work."""
        self.now += seconds
        self.scheduler.upkeep.expire()

    def answer(self, link: WorkerLink, slot: int, prompt: int | None, finish: FinishReason | None = None) -> None:
        """Send a token of a request. `prompt`: number of prompt tokens with the first token, else None."""
        columns = StepColumns()
        columns.add(slot, TokenOutput("", [7], finish, None, prompt, 0 if prompt else None))
        turn = pb.WorkerTurn(seq=next(self.serial))
        turn.step.CopyFrom(columns.to_pb())
        link.apply(turn)

    def running(self) -> list[tuple[WorkerLink, int, OutputSequence[Any]]]:
        """Return the link and slot of each sequence that has a worker."""
        return [
            (link, sequence.slot, sequence)
            for call in self.calls
            for sequence in call.sequences
            if (link := sequence.link) is not None
        ]

    def preparations(self) -> list[Preparation]:
        """Return the preparations that workers compute."""
        return [sink for link in self.links.values() for sink in link.slots.sinks if isinstance(sink, Preparation)]

    @precondition(lambda self: self.running())
    @rule(number=st.integers(0, 9), finish=st.sampled_from([None, None, None, FinishReason.STOP]))
    def token(self, number: int, finish: FinishReason | None) -> None:
        """Send a token of a sequence."""
        running = self.running()
        link, slot, sequence = running[number % len(running)]
        begins = sequence.state in (State.SENT, State.RESENT)
        self.answer(link, slot, sequence.tokens if begins else None, finish)

    @precondition(lambda self: self.preparations())
    @rule(number=st.integers(0, 9), what=st.sampled_from(["done", "done", "refused", "error", "more"]))
    def prepared(self, number: int, what: str) -> None:
        """End a preparation. If it is done and its worker has room, the sequence has moved there."""
        each = self.preparations()
        preparation = each[number % len(each)]
        link, origin, sequence = preparation.link, preparation.origin, preparation.sequence
        free, tokens = link.free, sequence.tokens
        has_room = link.takes_new_requests and free.sequences > 0 and free.tokens >= tokens
        moves = what in ("done", "more") and sequence.link is origin and has_room
        moves = moves and tokens - preparation.tokens < LEAST_TOKENS
        if what == "refused":
            link.apply(pb.WorkerTurn(seq=1, refused=[pb.Refused(slot=preparation.slot, reason="NO_ROOM")]))
        else:
            finish = {"done": FinishReason.LENGTH, "error": FinishReason.ERROR}.get(what)
            self.answer(link, preparation.slot, sequence.tokens, finish)
        assert preparation not in self.preparations()
        paced = bool(link.pacing.resumed_tokens)
        self.events.link_changed(link)
        if moves and self.now < origin.move_requests_at:
            assert sequence.link is origin, "the drain was undone"
        elif moves and not paced:
            assert sequence.link is link
            assert sequence.life.reason == "moved"

    @precondition(lambda self: self.links)
    @rule(number=st.integers(0, 2))
    def lose(self, number: int) -> None:
        """Break the link of a worker."""
        name = sorted(self.links)[number % len(self.links)]
        link = self.links.pop(name)
        link.end("lost")
        self.events.link_down(link, "lost")

    @precondition(lambda self: self.calls)
    @rule(number=st.integers(0, 9))
    def end_call(self, number: int) -> None:
        """End a call, whose caller has gone."""
        self.scheduler.leave(self.calls.pop(number % len(self.calls)))

    @invariant()
    def slots_match_states(self) -> None:
        """Check that a running sequence has one slot, and at most one preparation at another worker."""
        preparations = self.preparations()
        for call in self.calls:
            (sequence,) = call.sequences
            assert (sequence.link is not None) == (sequence.state in RUNS)
            assert sum(each.sequence is sequence for each in preparations) <= 1
        assert all(each.link is not each.origin for each in preparations)
        known = {call.sequences[0].key for call in self.calls}
        assert {each.sequence.key for each in preparations} <= known, "an ended call is prepared"
        assert len(self.running()) + len(preparations) == sum(link.running for link in self.links.values())

    def teardown(self) -> None:
        """Close all calls, and check that no link, queue, account or move holds anything."""
        for call in self.calls:
            self.scheduler.leave(call)
        self.calls.clear()
        self.slots_match_states()
        order = self.charges.fair.order("m").statistics()
        assert (order.waiting, order.open_charges) == (0, 0)
        assert (len(self.scheduler.moves), self.scheduler.queues.waiting("m")) == (0, (0, 0))
        for link in self.links.values():
            assert (link.running, link.slots.prefill_tokens) == (0, 0)
            assert (link.pacing.new_tokens, link.pacing.resumed_tokens) == (0, 0)


Gateway.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestGateway = Gateway.TestCase


def drained(tokens: int) -> tuple[Gateway, OutputSequence[Any]]:
    """Return a gateway whose only sequence has answered, and whose worker drains."""
    gateway = Gateway()
    gateway.link_up("w0")
    gateway.enter(tokens)
    (sequence,) = gateway.calls[0].sequences
    gateway.answer(gateway.links["w0"], sequence.slot, tokens)
    gateway.link_up("w1")
    gateway.drain("w0", drains=True)
    gateway.time_passes(2.0)
    return gateway, sequence


def test_a_long_sequence_is_prepared_and_a_short_one_is_not() -> None:
    """A long sequence goes on at its worker until the other worker has computed it. Then it is sent there with the few
    tokens to compute. A short sequence moves at once."""
    gateway, sequence = drained(LEAST_TOKENS)
    assert sequence.link is gateway.links["w0"]
    (preparation,) = gateway.preparations()
    gateway.answer(gateway.links["w0"], sequence.slot, None)
    assert len(sequence.emitted) == 2, "the stream goes on"
    gateway.answer(gateway.links["w1"], preparation.slot, LEAST_TOKENS + 1, FinishReason.LENGTH)
    assert sequence.link is gateway.links["w0"], "the message may hold credit that is not applied yet"
    gateway.events.link_changed(gateway.links["w1"])
    assert sequence.link is gateway.links["w1"]
    assert gateway.links["w1"].slots.prefill_tokens <= BLOCK
    gateway.teardown()
    gateway, sequence = drained(LEAST_TOKENS - 2)
    assert (sequence.link, gateway.preparations()) == (gateway.links["w1"], [])
    gateway.teardown()


def test_a_sequence_is_not_prepared_for_ever() -> None:
    """If preparations fail, the sequence moves without one."""
    gateway, sequence = drained(700)
    for _ in range(2):
        (preparation,) = gateway.preparations()
        refused = pb.Refused(slot=preparation.slot, reason="INVALID_FIELD", message="no")
        gateway.links["w1"].apply(pb.WorkerTurn(seq=1, refused=[refused]))
        assert sequence.link is gateway.links["w0"]
        gateway.time_passes(2.0)
    assert sequence.link is gateway.links["w1"]
    gateway.teardown()


def test_a_sequence_waits_for_room_where_it_was_computed() -> None:
    """If the worker that has computed a sequence is full at that moment, the sequence moves there once it has room,
    although another worker has room earlier on and less load."""
    gateway, sequence = drained(700)
    (preparation,) = gateway.preparations()
    first, second = gateway.links["w0"], gateway.links["w1"]
    gateway.grant(second, 0)
    gateway.answer(second, preparation.slot, sequence.tokens, FinishReason.LENGTH)
    gateway.time_passes(0.3)
    assert sequence.link is first
    gateway.link_up("w2")
    gateway.grant(second, 50)
    assert sequence.link is second
    gateway.teardown()


def test_a_sequence_stays_if_the_drain_is_undone() -> None:
    """If the drain is undone while another worker computes a sequence, the sequence stays. If the worker drains again
    much later, the sequence is computed again."""
    gateway, sequence = drained(700)
    (preparation,) = gateway.preparations()
    gateway.drain("w0", drains=False)
    gateway.answer(gateway.links["w1"], preparation.slot, sequence.tokens, FinishReason.LENGTH)
    gateway.events.link_changed(gateway.links["w1"])
    gateway.time_passes(60.0)
    assert sequence.link is gateway.links["w0"]
    gateway.drain("w0", drains=True)
    gateway.time_passes(2.0)
    assert sequence.link is gateway.links["w0"]
    assert len(gateway.preparations()) == 1
    gateway.teardown()


def test_a_preparation_ends_when_the_drain_is_about_to_end() -> None:
    """In the last part of a drain, sequences move without waiting for their preparation."""
    gateway, sequence = drained(700)
    assert len(gateway.preparations()) == 1
    gateway.links["w0"].prepares_until = gateway.now + 1.0
    gateway.time_passes(2.0)
    assert (sequence.link, gateway.preparations()) == (gateway.links["w1"], [])
    gateway.teardown()


def test_a_worker_that_is_lost_with_a_preparation_counts() -> None:
    """A sequence may be the cause if the worker that computes it is lost. It is not prepared a second time."""
    gateway, sequence = drained(700)
    gateway.link_up("w2")
    gateway.lose(1)
    assert sequence.life.loss.links
    gateway.time_passes(2.0)
    assert (sequence.link, gateway.preparations()) == (gateway.links["w2"], [])
    gateway.teardown()


async def test_a_stream_moves_without_computing_its_prompt_again(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """When its worker drains, a long stream goes on at another worker with the same text. That worker has the stream's
    tokens in its cache by then."""
    first = await cluster.add_worker(sim_engine(checkpoint, decode_ms=5), bundle)
    request = complete(" ".join(["river stone"] * 400), max_tokens=400, ignore_eos=True)
    whole = (await cluster.stub.Complete(request)).choices[0].text
    stream = cluster.stub.StreamComplete(request)
    text = (await read(stream)).choices[0].text
    second = await cluster.add_worker(sim_engine(checkpoint, decode_ms=5), bundle)
    engine: Any = second.engine
    draining = asyncio.create_task(first.end.drain(60.0))
    link = next(link for link in cluster.gateway.hub.links if link.identity.worker_id == first.identity.worker_id)
    await until(lambda: link.draining, "the gateway knows of the drain")
    link.move_requests_at = time.monotonic()  # as after half of the drain time
    await until(lambda: engine.statistics().finished == 1, "the other worker has computed the stream")
    while (chunk := await read(stream)) is not None:
        text += "".join(choice.text for choice in chunk.choices)
    assert text == whole
    assert engine.statistics().submitted == 2, "a preparation and the stream"
    assert engine.statistics().cached_tokens > LEAST_TOKENS
    await draining
    await cluster.until_idle()
