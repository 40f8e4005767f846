"""The quantile of step durations, and the work that explains a long step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.worker.engine.step_times import FORGET_AFTER, GROWTH, LEAST_S, PATIENCE, SAMPLE_TOKENS, Quantile, StepTimes

durations = st.floats(1e-4, 100.0)


@given(st.lists(durations, min_size=1, max_size=16))
def test_the_quantile_is_that_of_all_durations(given_s: list[float]) -> None:
    """The estimated p99 is at least the p99 of all durations, and at most one bucket longer."""
    quantile = Quantile()
    for seconds in given_s:
        quantile.add(seconds)
    right = sorted(given_s)[math.ceil(0.99 * len(given_s)) - 1]
    assert right <= quantile.value_s * (1 + 1e-9)
    assert quantile.value_s <= right * GROWTH * (1 + 1e-9)


def test_one_slow_step_in_a_thousand_does_not_move_it() -> None:
    """The p99 ignores the slowest hundredth of the steps."""
    quantile = Quantile()
    for number in range(2000):
        quantile.add(5.0 if number % 1000 == 7 else 0.02)
    assert quantile.value_s == pytest.approx(0.02, rel=0.1)


def test_it_forgets_what_was_long_ago() -> None:
    """After a few thousand faster steps, the slow steps before them no longer count."""
    quantile = Quantile()
    for seconds in [1.0] * 500 + [0.01] * 16 * FORGET_AFTER:
        quantile.add(seconds)
    assert quantile.value_s == pytest.approx(0.01, rel=0.1)


@given(durations, st.integers(SAMPLE_TOKENS, 2048), st.integers(1, 2048))
def test_work_explains_in_proportion_and_not_for_ever(seconds: float, learned: int, tokens: int) -> None:
    """A step may take PATIENCE times as long as its prompt tokens usually take. `explains` returns False for a step
    that takes much longer."""
    pace = StepTimes(most_tokens=2048)
    pace.began(0.0)
    pace.step(seconds)
    pace.prefilled(learned)
    bound_s = PATIENCE * tokens * seconds / learned
    assert pace.explains(seconds + max(LEAST_S, bound_s) * 0.999, tokens)
    assert not pace.explains(seconds + max(LEAST_S, bound_s * GROWTH) * 1.001, tokens)
    assert not pace.explains(seconds, 0)


def test_a_step_computes_no_more_than_its_most() -> None:
    """However many prompt tokens are queued, they can explain a long step only up to the time for one chunk. A step
    computes at most one chunk of prompt tokens."""
    pace = StepTimes(most_tokens=100)
    pace.began(0.0)
    pace.step(0.2)
    pace.prefilled(100)
    assert pace.explains(1.1, 1_000_000)
    assert not pace.explains(1.4, 1_000_000)


def test_a_few_steps_that_stood_do_not_excuse_a_hang() -> None:
    """The time limit that is learned for a step stays short even if one step in twenty takes 30 s instead of 0.2 s. All
    steps compute prompts of the same length."""
    pace = StepTimes(most_tokens=100)
    now = 0.0
    pace.began(now)
    for number in range(200):
        now += 30.0 if number % 20 == 5 else 0.2
        pace.step(now)
        pace.prefilled(100)
    assert not pace.explains(now + 1.4, 100)


def test_rest_has_no_age() -> None:
    """An idle engine has no step age, and its idle time is not part of a step's duration."""
    pace = StepTimes()
    assert pace.age_s(5.0) == 0
    pace.began(10.0)
    assert pace.age_s(12.0) == 2.0
    pace.step(12.0, goes_on=False)
    assert pace.age_s(99.0) == 0
    pace.began(100.0)
    pace.step(101.0)
    assert pace.times.value_s == pytest.approx(2.0, rel=0.1)
    pace.mark_idle()
    assert pace.age_s(200.0) == 0
