"""Timely calls per second for each number of replicas, computed from recent demand. A call is timely if it is not late.

Problem: shared GPUs should go to the models that gain most from them, and the gain is not proportional to the load. The
queue is first come, first served. So a model with slightly fewer replicas than its load needs serves no call in time,
and with slightly more it serves nearly all calls in time. How many more are needed depends on the bursts of the model.

Method: each number of replicas in COUNTS is replayed on past demand, like a rule of backtest.py. The sums of timely
calls fade over `SPAN` cold starts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cluster.policy.scaling.portfolio import backtest
from cluster.policy.scaling.portfolio.backtest import Arrivals
from cluster.policy.scaling.portfolio.forecast import Floats

COUNTS = np.array([*range(33), 36, 40, 45, 50, 56, 64, 72, 80, 96, 112, 128, 160, 192, 256, 384, 512], dtype=float)
"""Numbers of replicas that are replayed. Values for other numbers are interpolated."""
SPAN = 10.0
"""Number of cold starts over which timely calls are counted. A started replica should be of use for this long."""


@dataclass(frozen=True, slots=True)
class MarginalGains:
    """Result of replaying past demand: calls served in time and queued work, one value for each number of replicas in
    COUNTS.

    `good`: calls served in time. `waiting`: work in the queue at the end of the replay, in replica-seconds. `time_s`:
    seconds that `good` covers. `good` and `time_s` fade with time.
    """

    good: Floats
    waiting: Floats
    time_s: float = 0.0

    def per_s(self, replicas: Floats) -> Floats:
        """Return how many calls a second are served in time, for each number of replicas in `replicas`."""
        return np.interp(replicas, COUNTS, self.good) / self.time_s if self.time_s else np.zeros(len(replicas))


def empty() -> MarginalGains:
    """Return zero gains, for use before any demand was replayed."""
    return MarginalGains(np.zeros(len(COUNTS)), np.zeros(len(COUNTS)))


def replay(before: MarginalGains, arrivals: Arrivals, passed_s: float, cold_start_s: float) -> MarginalGains:
    """Add the demand of the last `passed_s` seconds to the gains: how many calls each number of replicas serves
    in time.

    `before`: the gains before this demand. `arrivals`: the calls in these seconds. Older demand counts less;
    it fades more slowly if `cold_start_s` is long. Returns the new gains.
    """
    fade = math.exp(-passed_s / (SPAN * cold_start_s))
    waiting, late = backtest.queue_after(COUNTS, before.waiting, arrivals, 1.0, passed_s, cold_start_s)
    served = np.where(COUNTS > 0, (1.0 - late) * arrivals.calls, 0.0)
    return MarginalGains(
        np.maximum.accumulate(before.good * fade + served),
        waiting,
        before.time_s * fade + passed_s,
    )
