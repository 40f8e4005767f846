"""Which rule would have done: every rule runs in the shadow, and the cheapest that kept the slo is followed.

Problem: a margin that fits a steady model wastes GPUs, and one that fits a bursty model does not know the next. No
constant is right, and what is right can be tried: demand does not depend on how many replicas there are. So each rule
(a signal of forecast.py and a margin over it) is played on the demand that came, with its own cold starts and its own
line of waiting work, and two sums are kept for each, fading over `MEMORY` cold starts: the replica-seconds it would
have held, and the calls that it would have made late. The rule to follow is the cheapest among those whose late calls
stay below the budget. This is follow-the-leader among fixed experts (Cesa-Bianchi and Lugosi, "Prediction, Learning,
and Games", ch. 2-4) with a constraint in place of a mixed loss.

A rule's replicas: held = ceil(margin on signal); ready = the least held of the last cold start, for what was held
all that time has come up. Its line: what came, less what ready replicas serve; late is who waits longer than the slack
of the slo, by the same fluid as in loadtests/autoscale/optimum.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.policy.scaling.portfolio.forecast import SIGNALS, Floats

FACTORS = np.array([*(1.035 ** np.arange(22)), 2.2, 2.4, 2.7, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0])
STRAYS = np.array([*np.arange(0.5, 4.01, 0.25), 5.0, 6.0, 8.0])
MARGINS = len(FACTORS) + len(STRAYS)
FIXED = np.unique(np.round(1.05 ** np.arange(128)))
"""Replicas of rules that follow no signal: surges shorter than a cold start are served by what is there, or not."""
FOLLOWING = SIGNALS * MARGINS
RULES = FOLLOWING + len(FIXED)
CHOSEN = 24
MEMORY = 120.0
"""Cold starts after which what was seen counts for 1/e."""


@dataclass(frozen=True, slots=True)
class Backtest:
    """By rule: replica-seconds held, late calls, and the work that waits; and all calls. They fade."""

    cost: Floats
    late: Floats
    waiting: Floats
    calls: float = 0.0
    time_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Came:
    """One stretch of demand: its load in replicas, and how many calls.

    `slack_s`: for how long a call may wait in line; `behind_s`: replica-seconds of decoding that may be outstanding
    before streams fall below the pace of the slo.
    """

    load: float
    calls: float
    slack_s: float
    behind_s: float


def nothing() -> Backtest:
    """Before the first observation."""
    return Backtest(np.zeros(RULES), np.zeros(RULES), np.zeros(RULES))


def held(signals: Floats, stray: Floats) -> Floats:
    """By rule: how many replicas it wants, not rounded."""
    by_factor = signals[:, None] * FACTORS
    by_stray = signals[:, None] + stray[:, None] * STRAYS
    rules: Floats = np.concatenate([np.concatenate([by_factor, by_stray], axis=1).reshape(-1), FIXED])
    return rules


def whole(replicas: Floats, correction: float) -> Floats:
    """Rounded up, past what is lost in the arithmetic."""
    rounded: Floats = np.ceil(replicas * correction - 1e-6)
    return rounded


def played(
    before: Backtest, wanted: Floats, ready: Floats, came: Came, doubt: float, passed_s: float, cold_start_s: float
) -> Backtest:
    """With one more stretch. `wanted` and `ready` by rule, whole; rules face `doubt` times what came."""
    fade = float(np.exp(-passed_s / (MEMORY * cold_start_s)))
    waiting, late = line(ready, before.waiting, came, doubt, passed_s, cold_start_s)
    return Backtest(
        before.cost * fade + wanted * passed_s,
        before.late * fade + late * came.calls,
        waiting,
        before.calls * fade + came.calls,
        before.time_s * fade + passed_s,
    )


def line(
    ready: Floats, waiting: Floats, came: Came, doubt: float, passed_s: float, cold_start_s: float
) -> tuple[Floats, Floats]:
    """What waits after a stretch, in replica-seconds, and the share of its calls that are late.

    An overload first slows the streams that run: prompts go first, so work of decoding piles up (`behind_s`) till
    streams are at the pace of the slo. Only then prompts wait in line, for the slack at most. Work of more than a cold
    start's wait is let go: callers have gone, and rules recover as the real line would.
    """
    after = np.maximum(waiting + came.load * doubt * passed_s - ready * passed_s, 0.0)
    late = late_share(ready * came.slack_s + came.behind_s, waiting, after)
    return np.minimum(after, np.maximum(ready, 1.0) * cold_start_s), late


def late_share(allowed: Floats, before: Floats, after: Floats) -> Floats:
    """Of calls that come evenly while waiting work goes from `before` to `after`: who meets more than is allowed."""
    low, high = np.minimum(before, after), np.maximum(before, after)
    share = (high - allowed) / np.maximum(high - low, 1e-12)
    return np.where(high <= allowed, 0.0, np.minimum(share, 1.0))


def best(shadow: Backtest, late_budget: float, ahead: float) -> tuple[int, ...]:
    """The rules to follow: the CHOSEN cheapest within the budget, the cheapest first.

    `ahead` (1 or more): so many times what was seen is what the budget is for, as long as it is not spent: who spent on
    one surge what the window allows is not to be doubted for it. A rule that spent more counts as that much dearer, and
    by what it serves in time: where none is within the budget (no rule foresees a surge out of nothing) GPUs are not
    heaped up without end, nor saved by serving nobody.
    """
    allowed = late_budget * shadow.calls * ahead
    served = np.maximum(1.0 - shadow.late / max(shadow.calls, 1e-9), 1e-9)
    price = shadow.cost * np.maximum(shadow.late / max(allowed, 1e-9), 1.0) / served
    order = np.argsort(price, kind="stable")[: int(CHOSEN)]
    return tuple(order.tolist())
