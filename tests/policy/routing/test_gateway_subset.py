"""Tests of a worker's choice of the gateways to which it connects."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.routing.gateway_subset import ALL_UP_TO, LEAST_WORKERS, GatewaySubset

NAMES = st.lists(st.text("abcdefgh0123", min_size=1, max_size=8), min_size=1, max_size=40, unique=True)
RULES = st.builds(GatewaySubset, st.text(max_size=8), st.integers(1, 20), st.integers(0, 200))


@given(st.text(max_size=8), NAMES.filter(lambda names: len(names) <= ALL_UP_TO))
def test_a_worker_connects_to_all_of_few_gateways(worker: str, gateways: list[str]) -> None:
    assert GatewaySubset(worker, replicas=1000).of(gateways) == tuple(gateways)


@given(RULES, NAMES, st.randoms(use_true_random=False))
def test_the_choice_does_not_depend_on_the_order(rule: GatewaySubset, gateways: list[str], random: object) -> None:
    chosen = rule.of(gateways)
    assert len(chosen) == rule.links(len(gateways)) >= min(rule.most, len(gateways))
    shuffled = list(gateways)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert set(rule.of(shuffled)) == set(chosen)


@given(RULES, NAMES.filter(lambda names: len(names) > 1))
def test_a_gateway_that_goes_changes_no_link_to_others(rule: GatewaySubset, gateways: list[str]) -> None:
    """When a gateway leaves, a worker keeps its links to the other gateways and begins at most one new link. If a
    worker now needs fewer links, it may end as many as it no longer needs."""
    before, after = set(rule.of(gateways)), set(rule.of(gateways[1:]))
    ended, begun = before - after - {gateways[0]}, after - before
    assert len(ended) <= rule.links(len(gateways)) - rule.links(len(gateways) - 1)
    assert len(begun) <= 1


@pytest.mark.slow
@given(st.integers(ALL_UP_TO + 1, 64), st.integers(1, 300), st.integers(1, 10**6))
def test_every_gateway_gets_workers_of_each_model(gateways: int, workers: int, seed: int) -> None:
    """Every gateway has workers of each model, and all gateways have about the same number of workers."""
    names = [f"gateway-{seed}-{number}:50052" for number in range(gateways)]
    counts = dict.fromkeys(names, 0)
    for number in range(workers):
        for name in GatewaySubset(f"worker-{seed}-{number}", replicas=workers).of(names):
            counts[name] += 1
    if workers <= LEAST_WORKERS:
        assert set(counts.values()) == {workers}
    mean = sum(counts.values()) / gateways
    assert min(counts.values()) >= 1
    assert max(counts.values()) <= mean + 6 * math.sqrt(mean)
