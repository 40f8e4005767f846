"""Tests of the replicas in the scaling simulation: no call is lost, and no call waits longer than a gateway allows."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config.gateway import Queue
from loadtests.sim.fleet import MAX_WAIT_S, Arrival, Fleet
from loadtests.sim.plant import ReplicaModel

PLANT = ReplicaModel()
ARRIVALS = st.lists(
    st.tuples(st.floats(0, 400), st.integers(1, 40), st.integers(1, 4000), st.integers(1, 300)), max_size=30
)


def test_the_bound_is_the_gateways() -> None:
    """The maximum wait of a call in the simulated queue is the maximum wait in a gateway with the default
    configuration."""
    assert Queue().max_wait_s == MAX_WAIT_S


@pytest.mark.slow
@settings(deadline=None)
@given(ARRIVALS, st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_every_call_waits_runs_or_is_judged(arrivals: list[tuple[float, int, int, int]], ready: list[int]) -> None:
    """At every moment, and with any number of replicas, every call waits, runs or has been judged.

    At the end, the fleet's sum of predicted output tokens equals the generated tokens, since predictions for
    refused calls are subtracted from the sum.
    """
    fleet, line = Fleet(PLANT, 2.0, 0.1), sorted(arrivals)
    made = 0.0

    def ended(count: float, tokens: float) -> None:
        nonlocal made
        made += count * tokens

    fleet.on_end = ended
    for now_s in range(1200):
        while line and line[0][0] < now_s + 1:
            at_s, count, prompt, output = line.pop(0)
            fleet.arrive(at_s, Arrival(count, prompt, output, 100.0))
        fleet.tick(float(now_s), 1.0, ready[now_s // 60 % len(ready)])
        begun = sum(count for _, _, count, *_ in fleet._streams if count > 0)
        judged = fleet.good + fleet.late + fleet.slow + begun
        assert judged + fleet.waiting_calls == pytest.approx(fleet.arrived, abs=1e-3)
        assert fleet.oldest_at_s is None or now_s - fleet.oldest_at_s <= MAX_WAIT_S or fleet._queue[0].left < 1
    if not fleet._streams and not fleet._queue:
        assert fleet.expected_tokens == pytest.approx(made, rel=1e-6, abs=1.0)
