"""A worker's links: the Submits and aborts of one link, and the credit of all links."""

from __future__ import annotations

import asyncio

from cluster.link.v1 import link_pb2 as pb
from cluster.wire.credit import Capacity
from cluster.wire.dial import HeartbeatSender
from cluster.wire.outbox import Outbox
from cluster.worker.drain_state import DrainStates
from cluster.worker.link import Link
from cluster.worker.link_credit import LinkCredit, credit_order


class _NoBeats(HeartbeatSender):
    """The heartbeat sender of a link without a connection."""

    def __init__(self) -> None:
        pass


def make_link() -> Link:
    """Return a link without a connection."""
    return Link(1, 1, "gateway", "incarnation", True, Outbox(), _NoBeats())


def test_an_abort_waits_for_its_submit() -> None:
    """An abort that arrives while its request is being submitted takes effect when the Submit ends: `finish_submit`
    then returns true, and false when called again. An abort that arrives later takes effect at once."""
    link = make_link()
    link.begin_submit(3, "r3")
    assert link.is_submitting(3)
    assert link.request_to_abort(3) is None
    assert link.finish_submit(3)
    assert not link.finish_submit(3)
    assert link.request_to_abort(3) == "r3"
    assert link.request_to_abort(4) is None, "an unknown slot, as of a request that has ended"


def test_a_refused_submit_leaves_nothing() -> None:
    """After a refused Submit its slot is free. An abort that arrived between the Submit and its refusal is dropped."""
    link = make_link()
    link.begin_submit(3, "r3")
    link.request_to_abort(3)
    link.refuse(3, "INVALID_FIELD", "why", "prompt")
    assert (link.finish_submit(3), link.requests) == (False, {})
    assert [refused.slot for refused in asyncio.run(link.outbox.next_message()).refused] == [3]


def test_credit_is_granted_while_the_worker_serves() -> None:
    """When the free capacity changes, the worker grants credit to the gateway. The link counts as unacknowledged until
    the gateway has acknowledged the newest grant.

    A cordoned worker grants nothing more.
    """
    free, drain_state, outbox = [Capacity(4, 1000)], DrainStates(), Outbox()
    credit = LinkCredit(lambda: (free[0], 0), lambda expected: expected, drain_state)
    credit.attach(7, outbox)
    assert credit.unacked_s(7) == 0
    credit.regrant()
    assert (credit.promised(), credit.unacked_s(7) > 0) == (free[0], True)
    first = asyncio.run(outbox.next_message()).credit
    credit.record_submit(7, pb.Submit(), b"\1\0\0\0" * 10)
    assert credit.promised() == Capacity(3, 990)
    free[0] = Capacity(8, 1000)
    credit.regrant()
    second = asyncio.run(outbox.next_message()).credit
    assert (second.grant_id, second.sequences) == (first.grant_id + 1, first.sequences + 5)
    credit.acknowledge(7, first.grant_id)
    assert credit.unacked_s(7) > 0
    credit.acknowledge(7, second.grant_id)
    assert credit.unacked_s(7) == 0
    drain_state.cordon(0.0)
    free[0] = Capacity(20, 1000)
    credit.regrant()
    assert credit.promised() == Capacity(8, 1000)
    credit.detach(7)
    assert credit.promised() == Capacity(0, 0)


def test_each_worker_has_another_order_of_links() -> None:
    """Different workers grant credit to the same gateways in different orders. A worker with several links to one
    gateway grants credit in the order of the links' numbers."""
    firsts = {
        min("abc", key=lambda gateway: credit_order(worker, gateway, 1)) for worker in ("m-4f1", "m-b07", "m-c5d2")
    }
    assert len(firsts) > 1
    assert credit_order("w", "a", 1) < credit_order("w", "a", 2)
