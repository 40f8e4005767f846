"""A sequence of a pooling call (a request for vectors), tested with the scheduler and real links.

When its worker drains, the sequence moves to another worker, like a sequence that generates text.
"""

from __future__ import annotations

import itertools
from typing import Any, cast

from cluster.api.pooling import PoolingOptions, PoolingTask
from cluster.api.types import DrainState, EngineRequest, FinishReason, Sampling, TokenOutput
from cluster.gateway.calls.pooling.pooled_sequence import PooledSequence
from cluster.gateway.calls.pooling.pooling_call import PoolingCall
from cluster.gateway.calls.pooling.pooling_request import PoolingInputs
from cluster.gateway.calls.sequences.life import State
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.scheduling.scheduler import Scheduler
from cluster.gateway.scheduling.service_charges import ServiceCharges
from cluster.gateway.scheduling.worker_events import WorkerEvents
from cluster.link.v1 import link_pb2 as pb
from cluster.observe.metrics import Metrics
from cluster.policy.fairness.waiting_room import WaitingRoom
from cluster.policy.tenants.policy import TenantPolicy
from tests.support.linked_scheduler import Host, linked_worker

NOW = 1000.0


def test_a_draining_worker_hands_its_pooled_sequences_over() -> None:
    """A sequence that a draining worker has not computed is sent to another worker, which returns its vector."""
    times = [NOW]
    serial, metrics = itertools.count(1), Metrics("test")
    charges = ServiceCharges({"standard": 0}, metrics)
    room = WaitingRoom(max_requests=9, max_tokens=10_000, max_wait_s=9.0, order_of=charges.fair.order)
    scheduler = Scheduler(Host(), room, charges, metrics, lambda: times[-1], 5.0)
    events = WorkerEvents(scheduler, metrics, lambda: times[-1])

    def link_up(name: str) -> WorkerLink:
        link = linked_worker(events, name, serial)
        credit = pb.Credit(grant_id=next(serial), sequences=50, tokens=100_000)
        link.apply(pb.WorkerTurn(seq=next(serial), credit=credit))
        events.link_changed(link)
        return link

    first = link_up("w0")
    inputs = cast(PoolingInputs, None)
    call = PoolingCall(
        "c",
        "m",
        TenantPolicy("a", handle="a"),
        0,
        NOW,
        None,
        lambda: times[-1],
        scheduler.events,
        inputs=inputs,
        task=PoolingTask.EMBED,
    )
    request = EngineRequest("", [1] * 9, Sampling(max_tokens=1), pooling=PoolingOptions(PoolingTask.EMBED, 1))
    call.add_inputs([PooledSequence(call, 0, request)])
    model = scheduler.host.directory.find("m")
    assert model is not None
    scheduler.enter(call, model)
    sequence: Any = call.sequences[0]
    assert sequence.link is first

    second = link_up("w1")
    first.drain_state, first.move_requests_at = DrainState.DRAINING, NOW
    events.link_changed(first)
    times.append(NOW + 2)
    scheduler.upkeep.expire()
    assert (sequence.link, first.running) == (second, 0)
    sequence.output(TokenOutput("", [], FinishReason.STOP, prompt_tokens=9, cached_tokens=0, vector=bytes(4)))
    assert (sequence.state, sequence.vector, sequence.delivered) == (State.DONE, bytes(4), 0)
    scheduler.leave(call)
