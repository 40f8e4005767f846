"""A gateway's scheduler and the simulator's policy make the same decisions: all events of the scheduler are replayed on
the policy."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from cluster.api.types import EngineRequest, FinishReason, Sampling, TokenOutput
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.sequences.sequence import OutputSequence
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.scheduling.scheduler import Scheduler
from cluster.gateway.scheduling.service_charges import ServiceCharges
from cluster.gateway.scheduling.worker_events import WorkerEvents
from cluster.link.v1 import link_pb2 as pb
from cluster.observe.metrics import Metrics
from cluster.policy.fairness.fair_queue import FairOrders
from cluster.policy.fairness.waiting_room import WaitingRoom
from cluster.policy.scheduling.scheduling_policy import SchedulingPolicy
from cluster.policy.scheduling.worker_losses import WorkerLosses
from cluster.policy.tenants.policy import TenantPolicy
from cluster.wire.codecs.codec import StepColumns
from tests.support.linked_scheduler import Host, PlainText, enters, linked_worker
from tests.support.policy_journal import Journal, RecordedOrder, RecordedPolicy, replay

TOKENS = 30
"""Number of tokens after which a sequence ends."""
WEIGHTS = {"a": 1.0, "b": 2.0}


class Gateway(RuleBasedStateMachine):
    """State machine that tests a gateway's scheduler with real calls and real worker links. Its rules do what callers
    and workers would do."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.serial = itertools.count(1)
        self.journal = Journal()
        metrics = Metrics("test")
        charges = ServiceCharges({"standard": 0, "batch": 1}, metrics)
        charges.fair = FairOrders(lambda: RecordedOrder(self.journal, "m", lambda tenant: WEIGHTS[tenant]))
        self.scheduler = Scheduler(
            Host(),
            room_of(charges.fair.order),
            charges,
            metrics,
            self.clock,
            5.0,
            policy_of=lambda room, workers, wait_s, losses: RecordedPolicy(self.journal, room, workers, wait_s),
        )
        self.events = WorkerEvents(self.scheduler, metrics, self.clock)
        self.links: dict[str, WorkerLink] = {}
        self.calls: list[Call] = []

    def clock(self) -> float:
        """The virtual time, in seconds."""
        return self.now

    @initialize()
    def first_workers(self) -> None:
        """Connect two workers and begin a call on one of them."""
        for name in ("w0", "w1"):
            self.link_up(name, "weights", 2)
        self.enter("a", 1, None, 0)
        self.step(0, False)

    @rule(
        name=st.sampled_from(["w0", "w1", "w2"]), weights=st.sampled_from(["weights", "others"]), free=st.integers(0, 3)
    )
    def link_up(self, name: str, weights: str, free: int) -> None:
        """Connect a worker, or grant further credit to a connected worker."""
        link = self.links.get(name)
        if link is None:
            link = self.links[name] = linked_worker(self.events, name, self.serial, weights=weights)
        if free:
            credit = pb.Credit(grant_id=next(self.serial), sequences=free, tokens=1000 * free)
            link.apply(pb.WorkerTurn(seq=next(self.serial), credit=credit))
            self.events.link_changed(link)

    @precondition(lambda self: self.links)
    @rule(number=st.integers(0, 2))
    def link_lost(self, number: int) -> None:
        """Break the link of a worker, preferably of a worker with running requests."""
        busy = sorted(name for name, link in self.links.items() if link.running) or sorted(self.links)
        link = self.links.pop(busy[number % len(busy)])
        link.end("lost")
        self.events.link_down(link, "lost")

    @rule(
        tenant=st.sampled_from("ab"),
        outputs=st.integers(1, 2),
        wait_s=st.sampled_from([None, None, 2.0, 20.0]),
        rank=st.integers(0, 1),
    )
    def enter(self, tenant: str, outputs: int, wait_s: float | None, rank: int) -> None:
        """Open a call."""
        policy = TenantPolicy(tenant, handle=tenant, weight=WEIGHTS[tenant])
        deadline = None if wait_s is None else self.now + wait_s
        call = Call(f"c{next(self.serial)}", "m", policy, rank, self.now, deadline, self.clock, self.scheduler.events)
        request = EngineRequest("", [1] * 20, Sampling(max_tokens=TOKENS))
        call.sequences += [OutputSequence(call, index, request, PlainText()) for index in range(outputs)]
        if enters(self.scheduler, call):
            self.calls.append(call)

    @precondition(lambda self: any(link.running for link in self.links.values()))
    @rule(number=st.integers(0, 2), ends=st.integers(0, 9).map(lambda one: one == 0))
    def step(self, number: int, ends: bool) -> None:
        """Make an engine step for all requests of a worker."""
        busy = sorted(name for name, link in self.links.items() if link.running)
        link, columns = self.links[busy[number % len(busy)]], StepColumns()
        for call in self.calls:
            for sequence in call.sequences:
                if sequence.link is link:
                    columns.add(sequence.slot, self._output(sequence, ends))
        link.apply(pb.WorkerTurn(seq=next(self.serial), step=columns.to_pb()))

    def _output(self, sequence: OutputSequence[Any], ends: bool) -> TokenOutput:
        first = sequence.state.value in ("sent", "resent")
        finish = FinishReason.LENGTH if ends or len(sequence.emitted) == TOKENS - 1 else None
        return TokenOutput("", [7], finish, None, 20 if first else None, 0 if first else None)

    @precondition(lambda self: self.calls)
    @rule(number=st.integers(0, 9))
    def leave(self, number: int) -> None:
        """Close a call."""
        self.scheduler.leave(self.calls.pop(number % len(self.calls)))

    @rule(seconds=st.sampled_from([0.05, 0.05, 0.3, 1.0, 3.0]))
    def time_passes(self, seconds: float) -> None:
        """Let time pass, and do the gateway's periodic work."""
        self.now += seconds
        for call in self.calls:
            self.scheduler.follow(call)
        self.scheduler.upkeep.expire()

    def teardown(self) -> None:
        """Remove all calls, and check that the queues are empty. Then replay the journal on a policy that is built as
        in the simulator."""
        for call in self.calls:
            self.scheduler.leave(call)
        assert self.scheduler.queues.waiting("m") == (0, 0)
        replay(
            self.journal,
            lambda order_of, workers: SchedulingPolicy(room_of(order_of), workers, 5.0, WorkerLosses()),
            WEIGHTS.__getitem__,
        )


def room_of(order_of: Any) -> WaitingRoom:
    """Return a waiting room that refuses or sheds sequences when more than six wait."""
    return WaitingRoom(max_requests=6, max_tokens=10_000, max_wait_s=4.0, order_of=order_of)


Gateway.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestGateway = Gateway.TestCase
