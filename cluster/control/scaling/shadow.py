"""Which rule would have done: every rule runs in the shadow, and the cheapest that kept the slo is followed.

Problem: a margin that fits a steady model wastes GPUs, and one that fits a bursty model does not know the next. No
constant is right, and what is right can be tried: demand does not depend on how many replicas there are. So each rule
(a signal of levels.py and a margin over it) is played on the demand that came, with its own cold starts and its own
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

from cluster.control.scaling.levels import SIGNALS, Floats

FACTORS = np.array([*(1.035 ** np.arange(22)), 2.2, 2.4, 2.7, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0])
STRAYS = np.array([*np.arange(0.5, 4.01, 0.25), 5.0, 6.0, 8.0])
MARGINS = len(FACTORS) + len(STRAYS)
RULES = SIGNALS * MARGINS
CHOSEN = 24
MEMORY = 120.0
"""Cold starts after which what was seen counts for 1/e."""


@dataclass(frozen=True, slots=True)
class Shadow:
    """By rule: replica-seconds held, late calls, and the work that waits; and all calls. They fade."""

    cost: Floats
    late: Floats
    waiting: Floats
    calls: float = 0.0
    time_s: float = 0.0


def nothing() -> Shadow:
    """Before the first observation."""
    return Shadow(np.zeros(RULES), np.zeros(RULES), np.zeros(RULES))


def held(signals: Floats, stray: Floats) -> Floats:
    """By rule: how many replicas it wants, not rounded."""
    by_factor = signals[:, None] * FACTORS
    by_stray = signals[:, None] + stray[:, None] * STRAYS
    rules: Floats = np.concatenate([by_factor, by_stray], axis=1).reshape(-1)
    return rules


def whole(replicas: Floats, correction: float) -> Floats:
    """Rounded up, past what is lost in the arithmetic."""
    rounded: Floats = np.ceil(replicas * correction - 1e-6)
    return rounded


def played(
    before: Shadow,
    wanted: Floats,
    ready: Floats,
    load: float,
    calls: float,
    passed_s: float,
    slack_s: float,
    cold_start_s: float,
) -> Shadow:
    """With one more stretch. `wanted` and `ready` by rule, whole; `load` in replicas."""
    fade = float(np.exp(-passed_s / (MEMORY * cold_start_s)))
    served = ready * passed_s
    after = np.maximum(before.waiting + load * passed_s - served, 0.0)
    # Work of more than a minute's wait is let go: callers have gone, and rules recover as the real line would.
    after = np.minimum(after, np.maximum(ready, 1.0) * cold_start_s)
    late = late_share(ready, before.waiting, after, slack_s) * calls
    return Shadow(
        before.cost * fade + wanted * passed_s,
        before.late * fade + late,
        after,
        before.calls * fade + calls,
        before.time_s * fade + passed_s,
    )


def late_share(ready: Floats, before: Floats, after: Floats, slack_s: float) -> Floats:
    """Of calls that come evenly while waiting work goes from `before` to `after`: who waits longer than the slack."""
    allowed = ready * slack_s
    low, high = np.minimum(before, after), np.maximum(before, after)
    share = (high - allowed) / np.maximum(high - low, 1e-12)
    return np.where(high <= allowed, 0.0, np.minimum(share, 1.0))


def best(shadow: Shadow, late_budget: float) -> tuple[int, ...]:
    """The rules to follow: the CHOSEN cheapest within the budget, the cheapest first.

    Where none is within the budget, it is half as much again as the least late. That several are followed at once, and
    their mean is taken, makes up for what the single cheapest owes to chance.
    """
    allowed = max(late_budget * shadow.calls, 1.5 * float(shadow.late.min()))
    within = np.flatnonzero(shadow.late <= allowed)
    order = np.argsort(shadow.cost[within], kind="stable")[: int(CHOSEN)]
    return tuple(within[order].tolist())
