"""Backtest of scaling rules: every rule is replayed on past demand, and the cheapest rule that met the SLO is followed.

Problem: no constant margin is right for all models. A margin that fits one bursty model wastes GPUs on a steady model,
and does not fit the next bursty model. But rules can be tried on past demand, since demand does not depend on the
number of replicas.

Method: a rule asks for a number of replicas: a forecast of the load (a signal of forecast.py) plus a margin. Each rule
is replayed on past demand, with its own cold starts and queue. Two sums are kept for each rule and fade over `MEMORY`
cold starts: the replica-seconds that the rule would have held, and the calls that it would have served late. The rule
to follow is the cheapest rule whose late calls stay within the budget. This is follow-the-leader among fixed experts
(Cesa-Bianchi and Lugosi, "Prediction, Learning, and Games", ch. 2-4), with a constraint in place of a mixed loss.

Replicas of a rule: a rule holds as many replicas as its signal plus its margin, rounded up. The smallest number that it
held at any time during the last cold start counts as ready, because these replicas have had the time to start. Queue of
a rule: the work that arrived, less the work that the rule's ready replicas serve. A call is late if it waits longer
than the slack of the SLO (`Arrivals.slack_s`). The queue follows the fluid model of loadtests/autoscale/optimum.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.policy.scaling.portfolio.forecast import SIGNALS, Floats

FACTORS = np.array([*(1.035 ** np.arange(22)), 2.2, 2.4, 2.7, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0])
STRAYS = np.array([*np.arange(0.5, 4.01, 0.25), 5.0, 6.0, 8.0])
MARGINS = len(FACTORS) + len(STRAYS)
FIXED = np.unique(np.round(1.05 ** np.arange(128)))
"""Rules with a fixed number of replicas. A surge shorter than a cold start can only be served by replicas that already
run."""
FOLLOWING = SIGNALS * MARGINS
RULES = FOLLOWING + len(FIXED)
CHOSEN = 24
MEMORY = 120.0
"""Number of cold starts after which the weight of an observation has fallen to 1/e."""


@dataclass(frozen=True, slots=True)
class Backtest:
    """Sums of a backtest, in which recent values count more than old ones.

    The arrays have one value for each rule. `cost`: replica-seconds held. `late`: late calls. `waiting`: work
    in the queue, in replica-seconds. `calls`: number of calls, equal for all rules.
    """

    cost: Floats
    late: Floats
    waiting: Floats
    calls: float = 0.0
    time_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Demand in one stretch of time. `load`: the number of replicas that it keeps busy. `calls`: its number of
    calls.

    `slack_s`: time that a call may wait in the queue within the SLO. `behind_s`: largest backlog of decoding,
    in replica-seconds, with which the streams still meet the SLO's time between tokens.
    """

    load: float
    calls: float
    slack_s: float
    behind_s: float


def empty() -> Backtest:
    """Return the backtest before the first observation."""
    return Backtest(np.zeros(RULES), np.zeros(RULES), np.zeros(RULES))


def wanted_by_rule(signals: Floats, stray: Floats) -> Floats:
    """Return the number of replicas that each rule asks for, not rounded. `signals`: the load that each demand signal
    shows. `stray`: mean absolute error of each signal."""
    by_factor = signals[:, None] * FACTORS
    by_stray = signals[:, None] + stray[:, None] * STRAYS
    rules: Floats = np.concatenate([np.concatenate([by_factor, by_stray], axis=1).reshape(-1), FIXED])
    return rules


def round_up(replicas: Floats, correction: float) -> Floats:
    """Multiply numbers of replicas by `correction` and round up, with a tolerance for floating-point error."""
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
    """Replay the scaling rules on `passed_s` more seconds of demand, and return the new backtest.

    `wanted`: for each rule, the number of replicas that it would hold. `ready`: the number of these replicas that would
    have started. `doubt`: factor on the load.
    """
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
    """Return the queue of work after a period, in replica-seconds, and the share of the period's calls that are late.

    `ready`: number of replicas that serve. `waiting`: the queue before the period. `doubt`: factor by which the load of
    `arrivals` is multiplied. `passed_s`: length of the period.

    In an overload, decoding is delayed first, because prompts are computed first. Once `arrivals.behind_s` of
    decoding work is outstanding, streams are as slow as the SLO allows, and prompts begin to wait. Calls are late
    when their prompts wait longer than `arrivals.slack_s`. Work that would wait longer than one cold start is
    dropped, because its callers have gone.
    """
    after = np.maximum(waiting + arrivals.load * doubt * passed_s - ready * passed_s, 0.0)
    late = late_share(ready * arrivals.slack_s + arrivals.behind_s, waiting, after)
    return np.minimum(after, np.maximum(ready, 1.0) * cold_start_s), late


def late_share(allowed: Floats, before: Floats, after: Floats) -> Floats:
    """Return the share of the calls that arrive while the queue holds more work than `allowed`.

    The calls are evenly spaced, and the queue grows or shrinks evenly from `before` to `after`.
    """
    low, high = np.minimum(before, after), np.maximum(before, after)
    share = (high - allowed) / np.maximum(high - low, 1e-12)
    return np.where(high <= allowed, 0.0, np.minimum(share, 1.0))


def cheapest_rules(backtest: Backtest, late_budget: float, ahead: float) -> tuple[int, ...]:
    """Return the indexes of the rules to follow: the rules with the lowest prices, at most CHOSEN, the cheapest first.

    The price of a rule is its cost divided by the share of its calls that are not late. If more calls are late than
    the budget allows, the price is also multiplied by late calls / allowed late calls. This still ranks the rules well
    when all of them exceed the budget, as after a sudden surge: neither a rule that adds GPUs without end nor a rule
    that serves no calls is the cheapest.

    The number of allowed late calls is `late_budget` (a share of the calls) times the number of calls times `ahead`.
    With `ahead` above 1, the budget of later calls in the SLO window counts too. A rule may then use the whole budget
    in one surge without a higher price.
    """
    allowed = late_budget * backtest.calls * ahead
    served = np.maximum(1.0 - backtest.late / max(backtest.calls, 1e-9), 1e-9)
    price = backtest.cost * np.maximum(backtest.late / max(allowed, 1e-9), 1.0) / served
    order = np.argsort(price, kind="stable")[: int(CHOSEN)]
    return tuple(order.tolist())
