"""What so many replicas would have won: calls served in time a second by 0, 1, 2, ... of them, from what lately came.

Problem: shared GPUs go to whom they win most, and what they win is no line through the load. The line is first come
first served, so a model with a little less than its load serves nobody in time, one with a little more nearly all,
and how much more that takes is a matter of its bursts. So numbers of replicas are played on the demand that came, as
rules are (backtest.py), and their calls in time are kept, fading over `SPAN` cold starts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cluster.policy.scaling.portfolio import backtest
from cluster.policy.scaling.portfolio.backtest import Came
from cluster.policy.scaling.portfolio.forecast import Floats

COUNTS = np.array([*range(33), 36, 40, 45, 50, 56, 64, 72, 80, 96, 112, 128, 160, 192, 256, 384, 512], dtype=float)
"""Replicas that are played; what is between them is interpolated."""
SPAN = 10.0
"""Cold starts over which calls in time are counted: as long as a replica that is started should be of use."""


@dataclass(frozen=True, slots=True)
class MarginalGains:
    """By COUNTS: calls in time, and the work that waits. `time_s`: what they cover. Sums fade."""

    good: Floats
    waiting: Floats
    time_s: float = 0.0

    def per_s(self, replicas: Floats) -> Floats:
        """Calls in time a second by so many replicas."""
        return np.interp(replicas, COUNTS, self.good) / self.time_s if self.time_s else np.zeros(len(replicas))


def nothing() -> MarginalGains:
    """Before the first stretch."""
    return MarginalGains(np.zeros(len(COUNTS)), np.zeros(len(COUNTS)))


def played(before: MarginalGains, came: Came, passed_s: float, cold_start_s: float) -> MarginalGains:
    """With one more stretch of demand."""
    fade = math.exp(-passed_s / (SPAN * cold_start_s))
    waiting, late = backtest.line(COUNTS, before.waiting, came, 1.0, passed_s, cold_start_s)
    served = np.where(COUNTS > 0, (1.0 - late) * came.calls, 0.0)
    return MarginalGains(
        np.maximum.accumulate(before.good * fade + served),
        waiting,
        before.time_s * fade + passed_s,
    )
