"""Backtest of scaling rules: every rule is replayed on the demand that came; the cheapest that met the SLO is followed.

Problem: a margin that fits a steady model wastes GPUs, and one that fits a bursty model does not fit the next. No
constant is right, but rules can be tried, since demand does not depend on the number of replicas. So each rule (a
signal of forecast.py and a margin over it) is replayed on the demand that came, with its own cold starts and its own
queue. Two sums are kept for each, fading over `MEMORY` cold starts: the replica-seconds it would have held, and the
calls it would have served late. The rule to follow is the cheapest one whose late calls stay within the budget. This is
follow-the-leader among fixed experts (Cesa-Bianchi and Lugosi, "Prediction, Learning, and Games", ch. 2-4) with a
constraint in place of a mixed loss.

A rule's replicas: held = ceil(margin on signal); ready = the least number held during the last cold start, because what
was held all that time has started. A rule's queue: the work that came, less what ready replicas serve. A call is late
if it waits longer than the slack of the SLO, by the same fluid model as in loadtests/autoscale/optimum.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.policy.scaling.portfolio.forecast import SIGNALS, Floats

FACTORS = np.array([*(1.035 ** np.arange(22)), 2.2, 2.4, 2.7, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0])
STRAYS = np.array([*np.arange(0.5, 4.01, 0.25), 5.0, 6.0, 8.0])
MARGINS = len(FACTORS) + len(STRAYS)
FIXED = np.unique(np.round(1.05 ** np.arange(128)))
"""Rules with a fixed number of replicas. A surge shorter than a cold start is served by what already runs, or not at
all."""
FOLLOWING = SIGNALS * MARGINS
RULES = FOLLOWING + len(FIXED)
CHOSEN = 24
MEMORY = 120.0
"""Cold starts after which an observation's weight has fallen to 1/e."""


@dataclass(frozen=True, slots=True)
class Backtest:
    """By rule: replica-seconds held, late calls, and work in the queue; and the number of calls. Sums fade."""

    cost: Floats
    late: Floats
    waiting: Floats
    calls: float = 0.0
    time_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Arrivals:
    """One stretch of demand: its load in replicas, and its number of calls.

    `slack_s`: time that a call may wait in the queue; `behind_s`: replica-seconds of decoding that may be outstanding
    before streams fall below the SLO's pace.
    """

    load: float
    calls: float
    slack_s: float
    behind_s: float


def empty() -> Backtest:
    """Backtest before the first observation."""
    return Backtest(np.zeros(RULES), np.zeros(RULES), np.zeros(RULES))


def wanted_by_rule(signals: Floats, stray: Floats) -> Floats:
    """Replicas that each rule asks for, not rounded."""
    by_factor = signals[:, None] * FACTORS
    by_stray = signals[:, None] + stray[:, None] * STRAYS
    rules: Floats = np.concatenate([np.concatenate([by_factor, by_stray], axis=1).reshape(-1), FIXED])
    return rules


def round_up(replicas: Floats, correction: float) -> Floats:
    """Replicas rounded up, with a tolerance for floating-point error."""
    rounded: Floats = np.ceil(replicas * correction - 1e-6)
    return rounded


def replay(
    before: Backtest,
    wanted: Floats,
    ready: Floats,
    arrivals: Arrivals,
    doubt: float,
    passed_s: float,
    cold_start_s: float,
) -> Backtest:
    """The backtest with one more stretch. `wanted` and `ready` are whole, by rule. `doubt` multiplies the load."""
    fade = float(np.exp(-passed_s / (MEMORY * cold_start_s)))
    waiting, late = queue_after(ready, before.waiting, arrivals, doubt, passed_s, cold_start_s)
    return Backtest(
        before.cost * fade + wanted * passed_s,
        before.late * fade + late * arrivals.calls,
        waiting,
        before.calls * fade + arrivals.calls,
        before.time_s * fade + passed_s,
    )


def queue_after(
    ready: Floats, waiting: Floats, arrivals: Arrivals, doubt: float, passed_s: float, cold_start_s: float
) -> tuple[Floats, Floats]:
    """Queue after a stretch, in replica-seconds, and the share of the stretch's calls that are late.

    An overload first slows running streams: prompts go first, so decoding work accumulates (up to `behind_s`) until
    streams are at the SLO's pace. Only then do prompts wait in the queue, for the slack at most. Work beyond one cold
    start's wait is dropped: its callers have gone, and rules recover as the real queue would.
    """
    after = np.maximum(waiting + arrivals.load * doubt * passed_s - ready * passed_s, 0.0)
    late = late_share(ready * arrivals.slack_s + arrivals.behind_s, waiting, after)
    return np.minimum(after, np.maximum(ready, 1.0) * cold_start_s), late


def late_share(allowed: Floats, before: Floats, after: Floats) -> Floats:
    """Share of evenly spaced calls that meet more work than `allowed`, as the queue goes from `before` to `after`."""
    low, high = np.minimum(before, after), np.maximum(before, after)
    share = (high - allowed) / np.maximum(high - low, 1e-12)
    return np.where(high <= allowed, 0.0, np.minimum(share, 1.0))


def cheapest_rules(backtest: Backtest, late_budget: float, ahead: float) -> tuple[int, ...]:
    """The rules to follow: the CHOSEN cheapest within the budget, the cheapest first.

    `ahead` (1 or more) multiplies the budget of late calls: as long as the SLO window's budget is not used up, a rule
    that spent it on one surge is not penalised. The price of a rule that exceeds its budget grows by the same factor,
    and by the share of calls that it serves in time. So if no rule is within the budget (no rule foresees a surge out
    of nothing), GPUs are neither added without end nor saved by serving no calls.
    """
    allowed = late_budget * backtest.calls * ahead
    served = np.maximum(1.0 - backtest.late / max(backtest.calls, 1e-9), 1e-9)
    price = backtest.cost * np.maximum(backtest.late / max(allowed, 1e-9), 1.0) / served
    order = np.argsort(price, kind="stable")[: int(CHOSEN)]
    return tuple(order.tolist())
