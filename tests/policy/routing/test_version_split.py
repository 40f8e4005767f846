"""Tests of the choice of a model's version by weight: equal for equal calls, proportional over many calls, and with few
changes when weights change.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.routing.version_split import choose_version

IDS = st.text(min_size=1, max_size=20)
VERSIONS = ("v1", "v2", "v3")
WEIGHTS = st.tuples(*(st.sampled_from([0.0, 0.01, 0.05, 0.5, 1.0]) for _ in VERSIONS))


def test_nobody_without_a_weight() -> None:
    """No version is chosen if there is no version with a weight above 0."""
    assert choose_version("a", []) == ""
    assert choose_version("a", [("v1", 0.0)]) == ""


def test_each_gets_its_part() -> None:
    """Over ten thousand calls, the share of each version is within three standard deviations of its weight."""
    got = [choose_version(f"req-{i}", [("v1", 0.95), ("v2", 0.05)]) for i in range(10_000)]
    assert abs(got.count("v2") - 500) < 3 * (10_000 * 0.05 * 0.95) ** 0.5


@given(IDS, WEIGHTS, st.permutations(range(3)))
def test_the_same_for_the_same_call(call_id: str, weights: tuple[float, ...], order: list[int]) -> None:
    """The version that is chosen for a call does not depend on the order of the versions. Only versions with a weight
    above 0 are chosen."""
    pairs = list(zip(VERSIONS, weights, strict=True))
    got = choose_version(call_id, pairs)
    assert got == choose_version(call_id, [pairs[i] for i in order])
    assert (got != "") == any(weights)
    assert got == "" or dict(pairs)[got] > 0


@given(IDS, WEIGHTS, st.integers(0, 2), st.floats(1.01, 100.0))
def test_a_growing_weight_only_gains(call_id: str, weights: tuple[float, ...], which: int, factor: float) -> None:
    """When the weight of one version grows, each call keeps its version or changes to this version."""
    before = choose_version(call_id, zip(VERSIONS, weights, strict=True))
    grown = [(v, w * factor if i == which else w) for i, (v, w) in enumerate(zip(VERSIONS, weights, strict=True))]
    assert choose_version(call_id, grown) in (before, VERSIONS[which])
