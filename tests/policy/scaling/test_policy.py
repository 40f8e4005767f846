"""Tests of the scaling policy: overload that the backtest foresees, GPUs shared by load, and scale-downs that are not
reverted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.policy.scaling.portfolio import (
    ClassDemand,
    Memory,
    ModelSeen,
    ModelSettings,
    Observation,
    Rates,
    ReplicaSeen,
    decide,
    marginal_gain,
)
from cluster.policy.scaling.portfolio.backtest import Arrivals, queue_after
from loadtests.autoscale.clairvoyant import lingering

SOME = st.floats(0.0, 50.0)


@given(SOME, SOME, st.integers(0, 40), SOME)
def test_more_replicas_never_make_more_calls_late(load: float, waiting: float, ready: int, behind: float) -> None:
    arrivals = Arrivals(load, 10.0, 1.7, behind)
    counts = np.array([float(ready), float(ready + 1)])
    after, late = queue_after(counts, np.full(2, min(waiting, max(ready, 1) * 60.0)), arrivals, 1.0, 5.0, 60.0)
    assert after.min() >= 0.0
    assert 0.0 <= late.min() <= late.max() <= 1.0
    assert late[1] <= late[0] + 1e-9


@given(SOME, SOME, st.integers(1, 40), SOME)
def test_streams_that_may_fall_behind_never_make_more_calls_late(
    load: float, waiting: float, ready: int, behind: float
) -> None:
    counts, before = np.array([float(ready)]), np.array([min(waiting, ready * 60.0)])
    strict, lax = (queue_after(counts, before, Arrivals(load, 10.0, 1.7, b), 1.0, 5.0, 60.0)[1] for b in (0.0, behind))
    assert lax[0] <= strict[0]


@given(st.lists(st.tuples(SOME, SOME), min_size=1, max_size=20))
def test_more_replicas_never_win_fewer_calls_and_never_more_than_came(stretches: list[tuple[float, float]]) -> None:
    won, came = marginal_gain.empty(), 0.0
    for load, calls in stretches:
        came = came * math.exp(-5.0 / (marginal_gain.SPAN * 60.0)) + calls
        won = marginal_gain.replay(won, Arrivals(load, calls, 1.7, 1.0), 5.0, 60.0)
    by_count = won.per_s(marginal_gain.COUNTS)
    assert by_count[0] == 0.0
    assert (np.diff(by_count) >= 0.0).all()
    assert by_count[-1] <= came / won.time_s + 1e-9


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(0, 3))
def test_a_lingering_plan_has_each_replica_at_least_as_long(plan: list[int], slots: int) -> None:
    replicas = np.array(plan, dtype=float)
    longer = lingering(replicas, slots)
    assert len(longer) == len(replicas)
    for at in range(len(plan)):
        assert longer[at] == replicas[max(at - slots, 0) : at + 1].max()


def _seen(calls: int, replicas: int, cls: str, most: int = 100) -> ModelSeen:
    demand = ClassDemand(calls, calls * 1000, calls * 100)
    return ModelSeen(
        ModelSettings(0, most),
        {cls: demand},
        [ReplicaSeen(f"r{n}", "ready", 0.0) for n in range(replicas)],
        {"": Rates(8000.0, 2600.0, 500_000)},
    )


def _corrections(rounds: Sequence[tuple[int, int]], replicas: int) -> list[float]:
    """Return the correction of the policy after each round, with a fixed number of replicas. A round is (calls, late
    calls)."""
    corrections, memory = [], Memory()
    for number, (calls, late) in enumerate(rounds, 1):
        seen = _seen(calls, replicas, "x")
        demand = dataclasses.replace(seen.demand["x"], within_slo=calls - late, outside_slo=late)
        models = {"m": dataclasses.replace(seen, demand={"x": demand})}
        decisions, memory = decide(Observation(models, covers_s=5.0), memory, number * 5.0)
        corrections.append(decisions[0].numbers["correction"])
    return corrections


@pytest.mark.slow
@settings(max_examples=10)
@given(st.integers(1, 50))
def test_late_calls_that_the_shadow_served_raise_the_correction_and_others_let_it_fall(late: int) -> None:
    rounds = [(50, late)] * 15 + [(50, 0)] * 400
    corrections = _corrections(rounds, 40)
    up, down = corrections[:15], corrections[15:]
    assert up == sorted(up)
    assert 1.0 < up[-1] <= 2.0
    assert down == sorted(down, reverse=True)
    assert down[-1] < up[-1]
    if late <= 10:
        assert down[-1] == 1.0, "a correction that is not needed goes"


def test_late_calls_in_an_overload_that_the_shadow_saw_leave_the_correction() -> None:
    """If the backtest foresaw an overload, late calls do not raise the correction (a factor on the number of
    replicas)."""
    foreseen = _corrections([(500, 500)] * 60, 1)
    unforeseen = _corrections([(500, 500)] * 60, 400)
    assert foreseen[-1] < 1.02
    assert unforeseen[-1] > 1.5


def test_classes_that_nobody_ranked_still_count_by_their_load() -> None:
    """If two models together want more GPUs than there are, the busier model gets more GPUs."""
    memory, have = Memory(), {"busy": 0, "calm": 0}
    for number in range(1, 61):
        models = {"busy": _seen(200, have["busy"], "x"), "calm": _seen(20, have["calm"], "x")}
        decisions, memory = decide(Observation(models, {"": 5}, covers_s=5.0), memory, number * 5.0)
        have = {decision.model: decision.total for decision in decisions}
    assert have["busy"] >= 4
    assert sum(have.values()) <= 5


@pytest.mark.slow
@settings(max_examples=40)
@given(st.lists(st.integers(40, 60), min_size=60, max_size=120))
def test_a_small_swing_takes_no_scale_down_back(loads: list[int]) -> None:
    """Within one cold start after a scale-down, a small rise of the load starts no replica if no calls wait."""
    memory, have, down_at = Memory(), 20, -1e9
    for number, calls in enumerate(loads, 1):
        now_s = number * 5.0
        decisions, memory = decide(Observation({"m": _seen(calls, have, "x")}, covers_s=5.0), memory, now_s)
        total = decisions[0].total
        if total > have:
            assert now_s - down_at > 60.0 or total > 1.25 * have
        if total < have:
            down_at = now_s
        have = total


@pytest.mark.slow
@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60)), min_size=10, max_size=60))
def test_nothing_leaves_that_what_runs_has_to_have(steps: list[tuple[int, int]]) -> None:
    """A model keeps the replicas that its running streams fill, even if few calls arrive.

    If all replicas are full, replicas for the calls that may arrive during a cold start are started too.
    """
    memory, have, places = Memory(), 1, 8
    for number, (calls, running) in enumerate(steps, 1):
        running = min(running, have * places)
        each = [running // have + (n < running % have) for n in range(have)] if have else []
        seen = ModelSeen(
            ModelSettings(0, 100, cold_start_s=6.0),
            {"x": ClassDemand(calls, calls * 30, calls * 400)},
            [ReplicaSeen(f"r{n}", "ready", 0.0, running=count) for n, count in enumerate(each)],
            {"": Rates(4000.0, 160.0, 65_536, float(places))},
        )
        decisions, memory = decide(Observation({"m": seen}, covers_s=5.0), memory, number * 5.0)
        have = decisions[0].total
        assert have * places >= running
    full = ModelSeen(
        ModelSettings(0, 100, cold_start_s=6.0),
        {"x": ClassDemand(4, 120, 1600)},
        [ReplicaSeen("r0", "ready", 0.0, running=places)],
        {"": Rates(4000.0, 160.0, 65_536, float(places))},
    )
    memory = Memory()
    for number in range(1, 41):
        decisions, memory = decide(Observation({"m": full}, covers_s=5.0), memory, number * 5.0)
    assert decisions[0].total * places >= places + math.sqrt(4 / 5 * 6.0), "its one replica is full"


def test_a_model_is_idle_when_nothing_runs() -> None:
    """A stream that lasts longer than `idle_s` keeps its replica. The replica is removed once no stream has run for
    `idle_s`."""
    memory, have, gone_at = Memory(), 1, 0.0
    for number in range(1, 121):
        now_s, ends_s = number * 5.0, 300.0
        replicas = [ReplicaSeen(f"r{n}", "ready", 0.0, running=int(now_s < ends_s)) for n in range(have)]
        calls = int(number == 1)
        seen = ModelSeen(
            ModelSettings(0, 4, idle_s=30.0, cold_start_s=6.0),
            {"x": ClassDemand(calls, calls * 30, calls * 400)},
            replicas,
            {"": Rates(4000.0, 160.0, 65_536, 8.0)},
        )
        decisions, memory = decide(Observation({"m": seen}, covers_s=5.0), memory, now_s)
        if have and not decisions[0].total:
            gone_at = now_s
        have = decisions[0].total
    assert ends_s + 25.0 <= gone_at <= ends_s + 40.0
