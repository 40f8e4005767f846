"""The clairvoyant optimum of one model: the fewest GPU-seconds that serve a demand known in advance.

Model: time is divided into slots, and work is divisible (the fluid version of loadtests/sim/fleet.py). In slot t,
n[t] replicas run. Work w[t] (replica-seconds) and c[t] calls arrive evenly. The replicas serve at most n[t] x slot
of the work, first come first served; the rest of the work waits. A call is late if the n[t] replicas need longer
for the work ahead of it than its class of calls may wait. (A long prompt may wait less than a short one, since its
prefill takes part of the same time to first token.) Since the future is known, each start begins one cold start
before the replica is needed. So a start costs no waiting, only GPU time: `cold_start_s` GPU-seconds for each
replica that n[t] has more than n[t-1]. n may take any value in any slot. The replicas of the first slot exist
already, as for the policies compared.

Objective: min sum n[t] x slot + cold x sum (n[t] - n[t-1])+ with at most `budget` of the calls late.

`solve` finds, for one price of a late call (GPU-seconds), the exact cheapest plan:

J[t](n, b) = n slot + price late[t](n, b) + min over m of [ cold (m - n)+ + J[t+1](m, b') ], b' = (b + w - n slot)+

Proof sketch. (1) The cost of a plan from slot t on depends on the past through n[t] and the waiting work b alone:
lateness and b' in a slot are functions of (n, b, w, c), and the price of starts is a function of (n, m). So
Bellman's principle holds and J[0] is the minimum over all plans, by induction from the last slot. (2) Work is
counted in quanta of slot / `quanta`, and served in multiples of them, so b' lies on the grid, and the recursion
itself rounds nothing. Only the demand is rounded, once; its rounding error is carried to the next slot, so that the
rounded demand never differs from the true one by more than a quantum. Work beyond the end of the grid is dropped,
which only makes plans cheaper. (3) min over m splits into m <= n, the running minimum of J, and m > n, the running
minimum of J + cold m from above, less cold n: O(1) for each state.

For every price, J minus (price x allowed late calls) is at most the constrained optimum. This is weak duality: the
constrained optimum's plan is one of those over which J is the minimum, and has at most the allowed number of late
calls. The largest of these bounds over the prices tried is `Optimum.bound_s`. The cheapest plan found that keeps
the budget is `Optimum.plan`; the gap between the two is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Slots:
    """Demand by time slot. `work`: quanta of work that arrive in each slot. `calls`: number of calls that arrive, by
    slot and class of calls."""

    work: NDArray[np.int64]
    calls: Floats
    slot_s: float
    quanta: int
    """Number of quanta that one replica serves in a slot."""

    @classmethod
    def of(cls, work_s: Sequence[float], calls: Floats, slot_s: float, quanta: int) -> Slots:
        """Return the demand in each time slot. Work is rounded to quanta, which are small units of work. The
        rounding error of a slot is carried over to the next slot.

        `work_s`: work that arrives in each slot, in replica-seconds. `slot_s`: length of a slot in seconds.
        `quanta`: number of quanta that one replica serves in a slot.
        """
        total = np.rint(np.cumsum(np.asarray(work_s)) * quanta / slot_s)
        work = np.diff(total, prepend=0.0).astype(np.int64)
        return cls(work, calls, slot_s, quanta)


@dataclass(frozen=True, slots=True)
class Rules:
    """Constraints on a plan. `slacks`: number of time slots that a call may wait, by class. All calls of a class with a
    slack below 0 are late."""

    slacks: tuple[float, ...]
    cold_start_s: float
    most: int
    """Upper bound on the number of replicas."""
    least: int = 0
    deepest: float = 4.0
    """Upper bound on remembered waiting work, in slots of `most` replicas. Work beyond the bound is forgotten."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Number of replicas in each slot, cost of the plan in GPU-seconds including starts, and number of late calls."""

    replicas: NDArray[np.int64]
    cost_s: float
    late: float


@dataclass(frozen=True, slots=True)
class Optimum:
    """The lowest possible cost of serving a demand, in GPU-seconds: at least `bound_s`, and at most `plan.cost_s`."""

    bound_s: float
    plan: Plan


def late_calls(n: Floats, before: Floats, after: Floats, calls: Floats, slacks: Sequence[float], quanta: int) -> Floats:
    """Return the number of late calls in a time slot, over all classes.

    `n`: number of replicas. `before` and `after`: waiting work at the beginning and at the end of the slot, in
    quanta. `calls`: calls that arrive in the slot, by class. `slacks`: slots that a call may wait, by class;
    all calls of a class with a slack below 0 are late. `quanta`: number of quanta that one replica serves in a
    slot.

    The wait of a call changes linearly over the slot, from before / (n x quanta) to after / (n x quanta) slots.
    """
    low, high = np.minimum(before, after), np.maximum(before, after)
    span = np.maximum(high - low, 1e-12)
    late = np.zeros(np.broadcast_shapes(n.shape, before.shape))
    for count, slack in zip(calls.tolist(), slacks, strict=True):
        if count and slack < 0:
            late += count
        elif count:
            late += count * np.clip((high - n * (slack * quanta)) / span, 0.0, 1.0)
    return late


def cost_of(replicas: NDArray[np.int64], slots: Slots, rules: Rules) -> Plan:
    """Return a plan with these numbers of replicas by time slot. The plan's cost and number of late calls are computed
    slot by slot."""
    grid_end = _grid_end(rules, slots)
    waiting, late = 0, 0.0
    for n, work, calls in zip(replicas.tolist(), slots.work.tolist(), slots.calls, strict=True):
        after = min(max(waiting + work - n * slots.quanta, 0), grid_end)
        state = [np.array([float(value)]) for value in (n, waiting, after)]
        late += float(late_calls(state[0], state[1], state[2], calls, rules.slacks, slots.quanta)[0])
        waiting = after
    starts = float(np.maximum(np.diff(replicas), 0).sum())
    return Plan(replicas, float(replicas.sum()) * slots.slot_s + rules.cold_start_s * starts, late)


def _grid_end(rules: Rules, slots: Slots) -> int:
    return int(np.ceil(rules.deepest * rules.most * slots.quanta))


def solve(slots: Slots, rules: Rules, price_s: float) -> Plan:
    """Return the cheapest plan when a late call costs `price_s` GPU-seconds."""
    n = np.arange(rules.least, rules.most + 1)
    end = _grid_end(rules, slots)
    b = np.arange(end + 1)
    levels, count = len(b), len(n)
    unserved = b[None, :] - n[:, None] * slots.quanta
    n_s, cold = n * slots.slot_s, rules.cold_start_s * n.astype(float)
    rows = np.arange(count)[:, None]
    kind = np.int8 if count < 127 else np.int16
    choice = np.zeros((len(slots.work), count, levels), dtype=kind)
    later = np.zeros((count, levels))
    before = np.broadcast_to(b.astype(float)[None, :], (count, levels))
    n_column = n.astype(float)[:, None]
    for t in range(len(slots.work) - 1, -1, -1):
        # find the cheapest continuation from n replicas, for each amount of work that waits at the next slot's
        # beginning
        fewer, fewer_at = _running_min(later)
        more, more_at = _running_min((later + cold[:, None])[::-1])
        more, more_at = more[::-1] - cold[:, None], count - 1 - more_at[::-1]
        use_more = more < fewer
        onward = np.where(use_more, more, fewer)
        choice[t] = np.where(use_more, more_at, fewer_at)
        after = np.clip(unserved + slots.work[t], 0, end)
        cost = onward[rows, after]
        if slots.calls[t].any():
            cost += price_s * late_calls(
                n_column, before, after.astype(float), slots.calls[t], rules.slacks, slots.quanta
            )
        later = cost + n_s[:, None]
    replicas = np.zeros(len(slots.work), dtype=np.int64)
    at, waiting = int(np.argmin(later[:, 0])), 0
    for t in range(len(slots.work)):
        replicas[t] = n[at]
        waiting = int(min(max(waiting + slots.work[t] - n[at] * slots.quanta, 0), end))
        at = int(choice[t][at, waiting])
    return cost_of(replicas, slots, rules)


def _running_min(values: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Return the running minimum along the first axis, and the positions of the minima."""
    least = np.minimum.accumulate(values, axis=0)
    rows = np.arange(len(values))[:, None]
    at = np.maximum.accumulate(np.where(values == least, rows, 0), axis=0)
    return least, at


def optimum(
    slots: Slots,
    rules: Rules,
    budget: float = 0.01,
    tries: int = 12,
    holds: Callable[[Plan], bool] | None = None,
) -> Optimum | None:
    """Return the cheapest plan whose share of late calls is at most `budget`, found by bisection over the price of a
    late call. The bisection is in the logarithm of the price. Returns None if even the highest price gives no such
    plan.

    `holds`: decides whether a plan keeps the budget. If it is None, the number of late calls in this fluid model
    decides.
    """
    allowed = budget * float(slots.calls.sum())
    keeps = holds or (lambda plan: plan.late <= allowed)
    low, high = 1e-3, 1e3
    bound, best = 0.0, solve(slots, rules, 1e6)
    if not keeps(best):
        return None
    for _ in range(tries):
        price = float(np.sqrt(low * high))
        plan = solve(slots, rules, price)
        bound = max(bound, plan.cost_s + price * (plan.late - allowed))
        if keeps(plan):
            high = price
            best = min(best, plan, key=lambda p: p.cost_s)
        else:
            low = price
    return Optimum(bound, best)
