"""Tests of the backlogs of one model: the waiting sequences that other gateways report, and the share of the next turns
that this gateway claims from workers.
"""

from __future__ import annotations

from cluster.policy.fairness.peer_backlog import Backlog, ServedTotal
from cluster.policy.fairness.service_counters import FlowKey
from tests.policy.fairness.test_fair_queue import call, order_of, turns


def test_waiting_elsewhere_is_not_idle_and_lifts_here_too() -> None:
    """A tenant that waits only at another gateway does not count as idle at this gateway.

    The first report of the other gateway sets the tenant's service counter here to the lowest counter of the tenants
    that wait here. Later reports do not raise the counter again, so the tenant's next call here is sent first.
    """
    order = order_of(*[call(f"a{i}", "a") for i in range(50)])
    turns(order, 10)
    there = {FlowKey(0, "b"): Backlog(3, 300.0)}
    order.backlogs.replace_peer("g2", there, 10.0)
    begun = order.counter("b")
    assert begun == order.counter("a")
    turns(order, 30, 11.0)
    order.backlogs.replace_peer("g2", there, 12.0)
    order.push(call("b", "b"), 12.5)
    assert order.counter("b") == begun
    assert turns(order, 1) == ["b"]


def test_a_silent_gateways_tenants_count_no_longer() -> None:
    """The reported backlog of a gateway is dropped after two seconds without a report."""
    order = order_of(call("a", "a"))
    order.backlogs.replace_peer("g2", {FlowKey(0, "b"): Backlog(3, 300.0)}, 1.0)
    assert order.statistics().backlogged == 2
    order.sweep(2.9)
    assert order.statistics().backlogged == 2
    order.sweep(3.1)
    assert order.statistics().backlogged == 1


def test_claims_are_parts_of_the_next_turns() -> None:
    """A gateway reports how many of the next turns of the fair queue it expects to get. Of two gateways with one tenant
    each, the gateway whose tenant has had more service expects few turns, and the other gateway expects many."""
    here, there = order_of(*[call(f"a{i}", "a") for i in range(10)]), order_of(call("b", "b"))
    turns(here, 5)
    here.backlogs.replace_peer("g2", there.backlogs.own(), 0.0)
    turns(here, 2)
    there.worker_totals.apply("w", "1", [], 0.0)
    there.backlogs.replace_peer("g1", here.backlogs.own(), 0.0)
    there.worker_totals.apply("w", "1", [ServedTotal(0, "a", 500.0, 0.0)], 0.0)
    assert here.backlogs.claimed_turns(picks=1) == 1
    assert there.backlogs.claimed_turns(picks=1) == 16
    assert order_of().backlogs.claimed_turns() == 0


def test_what_goes_before_in_any_case() -> None:
    """Two kinds of waiting sequences are certainly served before a new sequence: those of higher classes, and those of
    its own tenant. Sequences of other tenants in the same class are not counted."""
    order = order_of(call("h", "h", tokens=7), call("x", "x", tokens=50, rank=1), call("y", "y", tokens=80, rank=1))
    assert order.backlogs.service_ahead("x", 1) == 57.0
    assert order.backlogs.service_ahead("new", 1) == 7.0
