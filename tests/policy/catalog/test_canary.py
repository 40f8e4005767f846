"""Tests of the canary verdict: an equally good canary stays however long it is checked, and a worse canary is rolled
back early."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.policy.catalog.canary import ALPHA, CanaryTally, judge, log_evidence

RATIOS = {"error_ratio": 1.5, "ttft_ratio": 1.2}


def trial(chance: random.Random, calls: int, *, weight: float, fails: tuple[float, float], slower: float) -> int:
    """Simulate a canary; return the number of calls after which it is rolled back, or 0 if this does not happen
    within `calls`.

    The canary is checked after each call of the canary and after each failed call. `weight`: the canary's share
    of the calls. `fails`: probability that a call fails, for the stable version and for the canary. `slower`:
    probability that a call of the canary is slower than the call of the stable version with which it is compared.
    """
    stays, tried = CanaryTally(), CanaryTally()
    for number in range(1, calls + 1):
        on_trial = chance.random() < weight
        failed = chance.random() < fails[on_trial]
        if on_trial:
            lost = not failed and chance.random() < slower
            tried += CanaryTally(1, int(failed), int(not failed), int(lost))
        else:
            stays += CanaryTally(1, int(failed))
        if (failed or on_trial) and judge(stays, tried, **RATIOS).roll_back:
            return number
    return 0


def test_nothing_is_judged_by_nothing() -> None:
    """A canary without calls is not rolled back. A ratio of 0 disables the test of this ratio."""
    assert not judge(CanaryTally(), CanaryTally(), **RATIOS).roll_back
    bad = CanaryTally(calls=100, errors=100, pairs=100, slower=100)
    assert not judge(CanaryTally(calls=1000), bad, error_ratio=0, ttft_ratio=0).roll_back


def test_a_broken_version_goes_after_a_few_calls() -> None:
    """A canary whose first three calls fail is rolled back, if the stable version has had a hundred successful calls
    meanwhile."""
    verdict = judge(CanaryTally(calls=100), CanaryTally(calls=3, errors=3), **RATIOS)
    assert verdict.roll_back
    assert verdict.why == "3 of its 3 calls failed, 0 of 100 of the other: more than 1.5 times as often"
    assert not judge(CanaryTally(calls=100), CanaryTally(calls=2, errors=2), **RATIOS).roll_back


def test_a_slow_version_goes() -> None:
    """The times to first token of a canary's calls and of the stable version's calls are compared in pairs. The canary
    is rolled back if it is slower in twenty of twenty pairs, but not in ten of twenty."""
    assert not judge(CanaryTally(calls=20), CanaryTally(calls=20, pairs=20, slower=10), **RATIOS).roll_back
    verdict = judge(CanaryTally(calls=20), CanaryTally(calls=20, pairs=20, slower=20), **RATIOS)
    assert verdict.roll_back
    assert "20 of 20 pairs" in verdict.why


@pytest.mark.slow
def test_a_version_that_is_just_as_allowed_is_hardly_ever_taken_back() -> None:
    """A canary whose error ratio is exactly the allowed ratio is rolled back with a probability of at most 2 ALPHA:
    ALPHA for the test of errors and ALPHA for the test of times to first token."""
    chance = random.Random(7)
    runs = 300
    wrong = sum(trial(chance, 1500, weight=0.2, fails=(0.04, 0.06), slower=0.5) > 0 for _ in range(runs))
    sure = 3 * math.sqrt(2 * ALPHA * (1 - 2 * ALPHA) / runs)
    assert wrong / runs <= 2 * ALPHA + sure


@pytest.mark.slow
def test_a_worse_version_is_found() -> None:
    """A canary that is worse than the stable version is rolled back in every simulation.

    Worse means: it has far more errors than allowed, or it is the slower version in three of four comparisons.
    """
    chance = random.Random(11)
    failing = [trial(chance, 20_000, weight=0.05, fails=(0.02, 0.16), slower=0.5) for _ in range(40)]
    late = [trial(chance, 20_000, weight=0.05, fails=(0.0, 0.0), slower=0.75) for _ in range(40)]
    assert all(failing)
    assert all(late)


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(0, 200), st.floats(0.01, 0.99))
def test_evidence_grows_with_losses_and_falls_with_wins(losses: int, wins: int, chance: float) -> None:
    """The evidence against a canary starts at zero. Each lost comparison raises the evidence, each won comparison
    lowers it."""
    assert log_evidence(0, 0, chance) == pytest.approx(0.0)
    here = log_evidence(losses, wins, chance)
    assert log_evidence(losses + 1, wins, chance) > here
    assert log_evidence(losses, wins + 1, chance) < here


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), st.floats(0.05, 0.95))
def test_the_bet_is_fair(losses: int, wins: int, chance: float) -> None:
    """The evidence against a canary does not grow on average if the canary is no worse. When each comparison is lost
    with exactly the probability `chance`, the expected evidence after one more comparison equals the present
    evidence."""
    here = math.exp(log_evidence(losses, wins, chance))
    after = chance * math.exp(log_evidence(losses + 1, wins, chance)) + (1 - chance) * math.exp(
        log_evidence(losses, wins + 1, chance)
    )
    assert after == pytest.approx(here, rel=1e-6)
