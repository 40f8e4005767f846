"""Tests of the learnt rates of a replica: the true costs of a step are recovered from simulated steps."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.api.demand import ComputedWork
from cluster.policy.scaling.replica_rates import BEYOND_SEEN, Costs, LearntCosts, ReplicaLimits

LIMITS = ReplicaLimits(max_num_seqs=64, max_num_batched_tokens=2048, kv_tokens=100_000)


def spans(
    costs: Costs, seed: int, count: int, *, batch: int = 32, prompts: bool = True, noise: float = 0.0
) -> list[ComputedWork]:
    """Return an engine's cumulative counters, read `count` times with 50 steps between two readings. Batches have 1 to
    `batch` sequences. `prompts`: whether some steps compute prompts. `noise`: largest relative error of the busy
    time."""
    chance, at, out = random.Random(seed), ComputedWork(), []
    for _ in range(count):
        sequences = chance.randint(1, batch)
        prefill = chance.choice([0, 0, 500, 4000]) if prompts else 0
        busy_s = 50 * costs.fixed_s + 50 * sequences * costs.decode_s + prefill * costs.prefill_s
        busy_s *= 1 + noise * chance.uniform(-1, 1)
        at = ComputedWork(
            at.steps + 50, at.busy_s + busy_s, at.prefill_tokens + prefill, at.decode_tokens + 50 * sequences
        )
        out.append(at)
    return out


def learnt(works: list[ComputedWork]) -> LearntCosts:
    """Return the costs that are learnt from successive reports of one engine."""
    made = LearntCosts()
    for work in (ComputedWork(), *works):
        made.observe({"engine": work})
    return made


COSTS = st.builds(Costs, st.floats(1e-3, 3e-2), st.floats(1e-5, 1e-3), st.floats(1e-6, 1e-3))


@given(COSTS, st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_known_costs_are_found(costs: Costs, seed: int) -> None:
    """From exact step times, the exact costs are learnt, and the rates follow from them."""
    made = learnt(spans(costs, seed, 80))
    found = made.costs()
    assert found is not None
    assert found.fixed_s == pytest.approx(costs.fixed_s, rel=1e-3)
    assert found.decode_s == pytest.approx(costs.decode_s, rel=1e-3)
    assert found.prefill_s == pytest.approx(costs.prefill_s, rel=1e-3, abs=1e-8)
    rates = made.rates(LIMITS, itl_s=0.0)
    assert rates.prefill_tokens_per_s == pytest.approx(1 / (costs.prefill_s + costs.fixed_s / 2048), rel=1e-2)
    assert rates.decode_tokens_per_s == pytest.approx(64 / (costs.fixed_s + 64 * costs.decode_s), rel=1e-2)


@given(st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_noise_of_a_fifth_costs_no_more_than_that(seed: int) -> None:
    """With random noise of 20 % in the step times, each learnt rate is within 20 % of the true rate."""
    costs = Costs(0.01, 0.0005, 0.0001)
    rates = learnt(spans(costs, seed, 400, noise=0.2)).rates(LIMITS, itl_s=0.0)
    assert rates.decode_tokens_per_s == pytest.approx(64 / (0.01 + 64 * 0.0005), rel=0.2)
    assert rates.prefill_tokens_per_s == pytest.approx(1 / (0.0001 + 0.01 / 2048), rel=0.2)


def test_a_batch_is_trusted_no_further_than_seen() -> None:
    """If only single streams were observed, the learnt rate does not assume large batches. If no prompts were observed,
    there is no prefill rate."""
    rates = learnt(spans(Costs(0.01, 0.0, 0.0), 1, 40, batch=1, prompts=False)).rates(LIMITS, itl_s=0.05)
    assert rates.prefill_tokens_per_s is None
    assert rates.decode_tokens_per_s is not None
    assert rates.decode_tokens_per_s <= BEYOND_SEEN / 0.01 + 1e-6


def test_the_pace_that_is_asked_bounds_the_batch() -> None:
    """If a step takes 10 ms plus 1 ms for each sequence, a maximum step time of 30 ms allows twenty sequences."""
    rates = learnt(spans(Costs(0.01, 0.001, 0.0001), 1, 80)).rates(LIMITS, itl_s=0.03)
    assert rates.decode_tokens_per_s == pytest.approx(20 / 0.03, rel=0.01)


def test_an_engine_that_starts_anew_and_one_that_is_new() -> None:
    """Nothing is learnt from an engine's first report, or from a report whose counters have gone back. Such a report
    only sets the starting point."""
    made = LearntCosts()
    made.observe({"a": ComputedWork(1000, 500.0, 0, 1000)})
    made.observe({"a": ComputedWork(10, 1.0, 0, 10)})
    assert made.costs() is None
    made.observe({})
    made.observe({"a": ComputedWork(1000, 500.0, 0, 1000)})
    assert made.costs() is None
