"""Figures: paired ratios over interleaved rounds, with a 95 % bootstrap interval and the absolute difference.

On a shared machine, two runs of one server can differ more than two servers do. So the servers alternate (A-B-A-B),
each round gives one ratio of runs close in time, and the rounds are resampled with replacement. A bound is met if the
worse end of the interval is inside the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

MIN_ROUNDS = 10
DRAWS = 10_000
LEVEL = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the two ends of the 95 % interval of the estimate."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Bound:
    """Required bound: `<= limit` or `>= limit`."""

    sense: str
    limit: float

    def __post_init__(self) -> None:
        if self.sense not in ("<=", ">="):
            raise ValueError(f"a bound is <= or >=, not {self.sense!r}")

    def met(self, interval: Interval) -> bool:
        """Return whether the worse end of the interval is inside the bound."""
        return interval.high <= self.limit if self.sense == "<=" else interval.low >= self.limit

    def __str__(self) -> str:
        return f"{self.sense} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """A row of a scenario's table. `reason`: why `value` is None. `met`: whether the value is within the bound; None if
    the row has no bound."""

    name: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    bound: str | None = None
    met: bool | None = None
    reason: str | None = None
    unit: str = "ratio"
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    difference_unit: str | None = None
    rounds: int = 0
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the row as plain values."""
        return asdict(self)


def _bootstrap(estimate: Callable[[Any], Any], count: int, seed: int) -> Interval:
    """Return the bootstrap interval of an estimate. `estimate` gets an array of indices of shape (draws, count) and
    returns one estimate for each draw."""
    drawn = np.random.default_rng(seed).integers(0, count, size=(DRAWS, count))
    low, high = np.percentile(estimate(drawn), LEVEL)
    return Interval(float(estimate(np.arange(count)[None, :])[0]), float(low), float(high))


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Interval:
    """Return the geometric mean of the ratio ours/theirs over all rounds, with its bootstrap confidence interval.
    Raises ValueError if a round is unpaired, a value is not above zero, or there are no rounds."""
    _check_pairs(ours, theirs)
    if min(*ours, *theirs) <= 0:
        raise ValueError("a ratio needs values above 0")
    logs = np.log(np.asarray(ours) / np.asarray(theirs))
    # Quantiles are taken of the logarithms. Interpolation between ratios would give theirs/ours a different interval.
    log = _bootstrap(lambda index: logs[index].mean(axis=1), len(logs), seed)
    return Interval(float(np.exp(log.value)), float(np.exp(log.low)), float(np.exp(log.high)))


def paired_difference(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Interval:
    """Return the mean difference `ours` - `theirs` over the rounds, with its confidence interval."""
    _check_pairs(ours, theirs)
    return mean([a - b for a, b in zip(ours, theirs, strict=True)], seed)


def mean(values: Sequence[float], seed: int = 0) -> Interval:
    """Return the mean of the values of independent rounds, with its 95 % interval."""
    if not values:
        raise ValueError("no rounds")
    array = np.asarray(values)
    return _bootstrap(lambda index: array[index].mean(axis=1), len(array), seed)


def _check_pairs(ours: Sequence[float], theirs: Sequence[float]) -> None:
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"pairs of rounds are needed, got {len(ours)} and {len(theirs)}")


def too_few(rounds: int) -> str | None:
    """Return the reason why a bound cannot count as met; None if there are enough rounds."""
    return None if rounds >= MIN_ROUNDS else f"{rounds} rounds; a bound counts as met from {MIN_ROUNDS} on"


def ratio_figure(
    name: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    bound: Bound | None,
    *,
    scale: float = 1.0,
    difference_unit: str = "",
    note: str = "",
) -> Figure:
    """Return a row of the report: the ratio of `ours` to `theirs`, and their difference. Both lists have one value for
    each round. `scale`: factor that converts a difference of the values to `difference_unit`. With too few rounds the
    bound is never met."""
    if not ours or not theirs:
        return missing(name, bound, "no round gave a value for both")
    ratio, difference = paired_ratio(ours, theirs), paired_difference(ours, theirs)
    reason = too_few(len(ours))
    return Figure(
        name=name,
        value=ratio.value,
        low=ratio.low,
        high=ratio.high,
        bound=str(bound) if bound else None,
        met=bound.met(ratio) and reason is None if bound else None,
        reason=reason if bound else None,
        difference=difference.value * scale,
        difference_low=difference.low * scale,
        difference_high=difference.high * scale,
        difference_unit=difference_unit or None,
        rounds=len(ours),
        note=note,
    )


def plain_figure(
    name: str, interval: Interval, unit: str, bound: Bound | None, rounds: int, *, note: str = ""
) -> Figure:
    """Return a row of the report for a value that is not a ratio. `interval`: the value and its confidence interval.
    With fewer than MIN_ROUNDS rounds, the bound does not count as met."""
    reason = too_few(rounds) if bound else None
    return Figure(
        name=name,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        bound=str(bound) if bound else None,
        met=bound.met(interval) and reason is None if bound else None,
        reason=reason,
        unit=unit,
        rounds=rounds,
        note=note,
    )


def missing(name: str, bound: Bound | None, reason: str) -> Figure:
    """Return a row without a value, with the reason why the value was not measured."""
    return Figure(name, bound=str(bound) if bound else None, reason=reason)
