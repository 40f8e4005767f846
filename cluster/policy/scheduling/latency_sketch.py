"""Quantiles of durations. Recent durations count more than old ones.

Problem: a quantile of millions of durations must follow changes of the load, and must need little memory.

Invariants: a quantile is within a relative ACCURACY of a duration that was added, if the duration lies between
SHORTEST_S and LONGEST_S. After each half-life a duration counts half as much. Memory is bounded: about 140 counters.

Source: DDSketch (Masson, Rim, Lee, VLDB 2019) for the buckets, forward decay (Cormode, Shkapenyuk, Srivastava, Xu, ICDE
2009) for the weights.
"""

from __future__ import annotations

import math

ACCURACY = 0.05
SHORTEST_S = 1e-3
LONGEST_S = 1e3
MAX_DOUBLINGS = 64.0
"""Number of half-lives after which the weights are scaled down, so that they stay finite."""

_GAMMA = (1 + ACCURACY) / (1 - ACCURACY)
_LOG_GAMMA, _LOG_2 = math.log(_GAMMA), math.log(2)


class LatencySketch:
    """Durations in seconds, in buckets whose bounds grow by a constant factor. `now` is monotonic, in seconds."""

    __slots__ = ("_buckets", "_half_life_s", "_origin", "_total")

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._buckets: dict[int, float] = {}
        self._total = 0.0
        self._origin: float | None = None
        """Time at which a new duration has the weight 1. The weights of later durations are larger, so that the weights
        of old durations need no change."""

    def add(self, duration_s: float, now: float) -> None:
        """Add a duration."""
        growth = self._growth(now)
        bucket = math.ceil(math.log(min(max(duration_s, SHORTEST_S), LONGEST_S)) / _LOG_GAMMA)
        self._buckets[bucket] = self._buckets.get(bucket, 0.0) + growth
        self._total += growth

    def count(self, now: float) -> float:
        """Return the number of durations, each counted with its weight at `now`."""
        return self._total / self._growth(now)

    def quantile(self, part: float) -> float:
        """Return a quantile of the durations, in seconds. `part`: share of the durations that are shorter, in [0, 1].
        Raises ValueError if no duration was added."""
        if not self._buckets:
            raise ValueError("a quantile needs a duration")
        left = part * self._total
        for bucket in sorted(self._buckets):
            left -= self._buckets[bucket]
            if left < 0:
                break
        return 2 * math.exp(bucket * _LOG_GAMMA) / (_GAMMA + 1)

    def _growth(self, now: float) -> float:
        """Return the weight of a duration that is added at `now`."""
        if self._origin is None:
            self._origin = now
        doublings = max(now - self._origin, 0.0) / self._half_life_s
        if doublings > MAX_DOUBLINGS:
            scale = math.exp(-min(doublings, 1000.0) * _LOG_2)
            self._buckets = {bucket: weight * scale for bucket, weight in self._buckets.items() if weight * scale > 0}
            self._total = sum(self._buckets.values())
            self._origin, doublings = now, 0.0
        return math.exp(doublings * _LOG_2)

    def __repr__(self) -> str:
        return f"LatencySketch({len(self._buckets)} buckets)"
