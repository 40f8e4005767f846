"""Tests of the table of flows. A flow is the queue of one tenant for one model and class. Its counter measures the
service that the tenant got from this queue. The floor is the lowest counter of the flows with waiting sequences."""

from __future__ import annotations

import pytest

from cluster.policy.fairness.flow_table import FlowTable


@pytest.mark.parametrize(("idle_s", "counter"), [(3.0, 1000.0), (1.0, 950.0)])
def test_a_flow_that_returns_is_lifted(idle_s: float, counter: float) -> None:
    """A tenant's flow is idle for `idle_s` seconds and then gets a waiting sequence again. After more than 2 s, its
    counter is raised to the floor: the lowest counter of the flows that wait. After a shorter time, the counter may
    stay below the floor by at most 50: 100 tokens divided by the tenant's weight of 2."""
    flows = FlowTable(lambda tenant: 2.0, 2.0, 100.0)
    busy, quiet = flows.flow(0, "busy"), flows.flow(0, "quiet")
    flows.advance(10.0)
    flows.change_here(quiet, 1, 5.0)
    flows.change_here(quiet, -1, -5.0)
    flows.change_here(busy, 1, 5.0)
    flows.add_service(busy, 2000.0)
    flows.advance(10.0 + idle_s)
    flows.change_here(quiet, 1, 5.0)
    assert (quiet.counter, busy.counter, flows.charged) == (counter, 1000.0, 2000.0)
    assert quiet.since == flows.now


def test_idle_flows_are_forgotten() -> None:
    """`forget_idle` forgets each flow that has had no waiting sequences for `idle_s` seconds, unless one of the flow's
    calls still has a charge. It returns the rank of the priority class of each flow that has been idle for less than
    `idle_s`."""
    flows = FlowTable(lambda tenant: 1.0, 2.0, 100.0)
    for tenant in ("a", "b"):
        flow = flows.flow(1, tenant)
        flows.change_here(flow, 1, 1.0)
        flows.change_here(flow, -1, -1.0)
    flows.advance(1.0)
    gone, kept = flows.known("a", 1), flows.known("b", 1)
    assert gone is not None
    assert kept is not None
    gone.last_waiting = kept.last_waiting = 0.0
    assert flows.forget_idle([]) == [1, 1]
    flows.advance(3.0)
    assert flows.forget_idle([id(kept)]) == []
    assert (flows.known("a", 1), flows.known("b", 1)) == (None, kept)
