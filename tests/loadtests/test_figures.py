"""Tests of the figures in a load test's report: their intervals, their bounds, and rows without a measurement."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.figures import MIN_ROUNDS, Bound, mean, missing, paired_difference, paired_ratio, ratio_figure

ROUNDS = st.lists(st.floats(0.1, 100.0), min_size=2, max_size=15)


@given(ROUNDS, st.floats(0.1, 10.0))
def test_a_constant_ratio_has_an_interval_without_width(theirs: list[float], ratio: float) -> None:
    """`paired_ratio` returns a ratio with its confidence interval. If every round of a comparison has the same ratio,
    the interval has no width, however much the rounds differ in their values."""
    interval = paired_ratio([ratio * value for value in theirs], theirs)
    assert interval.low == pytest.approx(ratio)
    assert interval.value == pytest.approx(ratio)
    assert interval.high == pytest.approx(ratio)


@given(ROUNDS)
def test_the_estimate_lies_in_its_interval_and_turning_it_round_inverts_it(values: list[float]) -> None:
    """An estimated ratio lies in its confidence interval. The inverse ratio has the inverse estimate and the inverse
    interval."""
    ones = [1.0] * len(values)
    there, back = paired_ratio(values, ones), paired_ratio(ones, values)
    assert there.low <= there.value * (1 + 1e-9)
    assert there.value <= there.high * (1 + 1e-9)
    assert back.value == pytest.approx(1 / there.value)
    assert back.low == pytest.approx(1 / there.high)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Of 200 experiments with twelve rounds around a mean of 5, at least 85 % have an interval that contains 5. About
    95 % are expected."""
    rng = random.Random(7)
    covered = 0
    for experiment in range(200):
        interval = mean([rng.gauss(5, 1) for _ in range(12)], seed=experiment)
        covered += interval.low <= 5 <= interval.high
    assert covered >= 170


@pytest.mark.parametrize(
    ("sense", "limit", "ours", "met"),
    [("<=", 1.0, 0.9, True), ("<=", 1.0, 1.1, False), (">=", 1.0, 1.1, True), (">=", 1.0, 0.9, False)],
)
def test_met_looks_at_the_worse_end(sense: str, limit: float, ours: float, met: bool) -> None:
    """A figure meets its bound only if its whole confidence interval does. If the rounds lie far apart, on both sides
    of the bound, the figure does not meet the bound."""
    steady = ratio_figure("x", [ours] * MIN_ROUNDS, [1.0] * MIN_ROUNDS, Bound(sense, limit))
    assert steady.met is met
    spread = [ours * 8, ours / 8] * (MIN_ROUNDS // 2)
    assert ratio_figure("x", spread, [1.0] * MIN_ROUNDS, Bound(sense, limit)).met is False


def test_too_few_rounds_meet_nothing_and_say_so() -> None:
    """Nine perfect rounds do not meet a bound, and the row says that there were only nine."""
    figure = ratio_figure("x", [0.1] * 9, [1.0] * 9, Bound("<=", 1.0))
    assert figure.met is False
    assert "9 rounds" in str(figure.reason)


def test_the_difference_stands_beside_the_ratio_in_its_unit() -> None:
    """The row of a ratio also shows the absolute difference, here -2 µs per token, with its unit."""
    figure = ratio_figure("x", [8e-6] * 10, [10e-6] * 10, None, scale=1e6, difference_unit="µs/token")
    assert figure.value == pytest.approx(0.8)
    assert figure.difference == pytest.approx(-2)
    assert figure.difference_unit == "µs/token"
    assert paired_difference([3.0], [1.0]).value == 2.0


def test_what_was_not_measured_has_no_value_but_its_bound_and_the_reason() -> None:
    """A row without a measurement stays in the table, with the bound and the reason but without a value."""
    row = missing("x", Bound(">=", 1.5), "the peer did not start").as_json()
    assert row["value"] is None
    assert row["met"] is None
    assert row["bound"] == ">= 1.5"
    assert row["reason"] == "the peer did not start"


@pytest.mark.parametrize("pairs", [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0])])
def test_rounds_that_make_no_pairs_are_refused(pairs: tuple[list[float], list[float]]) -> None:
    """Rounds that cannot be paired raise an error and give no figure."""
    with pytest.raises(ValueError, match=r"pairs|above 0"):
        paired_ratio(*pairs)
