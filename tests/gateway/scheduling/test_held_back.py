"""Calls behind a call that no worker has room for, tested with the scheduler and real links: they are sent when that
call leaves its queue."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest

from cluster.api.pooling import PoolingOptions, PoolingTask
from cluster.api.types import EngineRequest, Sampling, WorkerIdentity
from cluster.gateway.calls.pooling.pooled_sequence import PooledSequence
from cluster.gateway.calls.pooling.pooling_call import PoolingCall
from cluster.gateway.calls.pooling.pooling_request import PoolingInputs
from cluster.gateway.links.liveness import LinkLiveness
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.scheduling.scheduler import Scheduler
from cluster.gateway.scheduling.service_charges import ServiceCharges
from cluster.gateway.scheduling.worker_events import WorkerEvents
from cluster.link.v1 import link_pb2 as pb
from cluster.observe.metrics import Metrics
from cluster.policy.fairness.waiting_room import WaitingRoom
from cluster.policy.tenants.policy import TenantPolicy
from tests.support.linked_scheduler import INFO, Host

NOW = 1000.0
MAX_WAIT_S = 9.0


@pytest.mark.parametrize("leaves", ["cancelled", "too late"])
def test_calls_behind_one_that_leaves_are_sent(leaves: str) -> None:
    """A worker has room for the second call and not for the first. The second is sent as soon as the first is cancelled
    or has waited too long, without news from the worker."""
    times, serial, metrics = [NOW], itertools.count(1), Metrics("test")
    charges = ServiceCharges({"standard": 0}, metrics)
    room = WaitingRoom(max_requests=9, max_tokens=10_000, max_wait_s=MAX_WAIT_S, order_of=charges.fair.order)
    scheduler = Scheduler(Host(), room, charges, metrics, lambda: times[-1], 5.0)
    events = WorkerEvents(scheduler, metrics, lambda: times[-1])
    link = WorkerLink(WorkerIdentity("w", "w-1", "m", node="w"), INFO, 1, events, LinkLiveness(0.0, 1.0, 1.0))
    events.link_up(link)
    link.apply(pb.WorkerTurn(seq=1, credit=pb.Credit(grant_id=1, sequences=5, tokens=50)))
    events.link_changed(link)
    model = scheduler.host.directory.find("m")
    assert model is not None

    def entered(tokens: int) -> PoolingCall:
        call = PoolingCall(
            f"c{next(serial)}",
            "m",
            TenantPolicy("a", handle="a"),
            0,
            times[-1],
            None,
            lambda: times[-1],
            scheduler.events,
            inputs=cast(PoolingInputs, None),
            task=PoolingTask.EMBED,
        )
        options = PoolingOptions(PoolingTask.EMBED, 1)
        request = EngineRequest("", [1] * tokens, Sampling(max_tokens=1), pooling=options)
        call.add_inputs([PooledSequence(call, 0, request)])
        scheduler.enter(call, model)
        return call

    large = entered(60)
    times.append(NOW + 1)
    small = entered(9)
    sequences: list[Any] = [large.sequences[0], small.sequences[0]]
    assert [sequence.link for sequence in sequences] == [None, None]
    if leaves == "cancelled":
        scheduler.leave(large)
    else:
        times.append(NOW + MAX_WAIT_S)
        scheduler.upkeep.expire()
        assert large.error is not None
    assert sequences[1].link is link
    scheduler.leave(small)
