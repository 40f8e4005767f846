"""Timely calls per second that 0, 1, 2, ... replicas would have served, from recent demand.

Problem: shared GPUs should go to the models where they gain most, and the gain is not proportional to the load. The
queue is first come, first served, so a model with slightly fewer replicas than its load serves no call in time, and one
with slightly more serves nearly all; how many more depends on its bursts. So numbers of replicas are replayed on the
demand that came, like rules (backtest.py), and their timely calls are summed, fading over `SPAN` cold starts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cluster.policy.scaling.portfolio import backtest
from cluster.policy.scaling.portfolio.backtest import Arrivals
from cluster.policy.scaling.portfolio.forecast import Floats

COUNTS = np.array([*range(33), 36, 40, 45, 50, 56, 64, 72, 80, 96, 112, 128, 160, 192, 256, 384, 512], dtype=float)
"""Numbers of replicas that are replayed; values between them are interpolated."""
SPAN = 10.0
"""Cold starts over which timely calls are counted: as long as a started replica should be of use."""


@dataclass(frozen=True, slots=True)
class MarginalGains:
    """By COUNTS: timely calls, and work in the queue. `time_s`: the time that they cover. Sums fade."""

    good: Floats
    waiting: Floats
    time_s: float = 0.0

    def per_s(self, replicas: Floats) -> Floats:
        """Timely calls per second by number of replicas."""
        return np.interp(replicas, COUNTS, self.good) / self.time_s if self.time_s else np.zeros(len(replicas))


def empty() -> MarginalGains:
    """Gains before the first stretch."""
    return MarginalGains(np.zeros(len(COUNTS)), np.zeros(len(COUNTS)))


def replay(before: MarginalGains, arrivals: Arrivals, passed_s: float, cold_start_s: float) -> MarginalGains:
    """The gains with one more stretch of demand."""
    fade = math.exp(-passed_s / (SPAN * cold_start_s))
    waiting, late = backtest.queue_after(COUNTS, before.waiting, arrivals, 1.0, passed_s, cold_start_s)
    served = np.where(COUNTS > 0, (1.0 - late) * arrivals.calls, 0.0)
    return MarginalGains(
        np.maximum.accumulate(before.good * fade + served),
        waiting,
        before.time_s * fade + passed_s,
    )
