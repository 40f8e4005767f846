"""The part of one gateway process in the overview: a JSON object. The overview is merged from the parts of all
processes.

A part holds rates, each computed from two snapshots. Numbers that cannot be added, such as percentiles, are sent as the
counts from which overview.py computes them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cluster.gateway.apis.slices import in_slices
from cluster.gateway.calls.call import Call
from cluster.gateway.console.overview.recent_calls import RecentCalls
from cluster.gateway.console.overview.rows import Row, ended_call_row, running_call_row
from cluster.gateway.console.overview.survey import Snapshot, Tally
from cluster.policy.limits.budgets import BudgetUse
from cluster.policy.limits.limits import Limit
from cluster.policy.tenants.policy import TenantLimits, TenantPolicy

Part = dict[str, Any]

NO_LIMITS: Final = TenantLimits()
FORMAT: Final = 1
"""Version of the format of a part. Parts of another format, from processes of another release, are left out."""
MAX_CALLS: Final = 2000
"""Maximum number of calls in an overview, and of ended calls in the part of one process."""
MAX_OPEN: Final = 1000
"""Maximum number of open calls in the part of one process."""
STEP_S: Final = 5
"""Seconds between two remembered snapshots, and length of a step of the history."""
WINDOW_S: Final = 60.0
"""Seconds over which percentiles and cache hits are computed."""
RATE_S: Final = 0.5
"""Minimum seconds between two snapshots from which a rate is computed."""
SMOOTH_S: Final = 60.0
"""Seconds over which a tenant's cost is averaged, since the cost of a call is known only at its end."""


@dataclass(slots=True)
class Limits:
    """A tenant's limits by name, each with its use, and the budget with the largest used fraction."""

    limits: dict[str, Row] = field(default_factory=dict)
    budget: Row | None = None


@dataclass(slots=True)
class _Cost:
    """A tenant's cost so far, the time at which it was read, and the moving average of the cost per hour."""

    cost: float
    at: float
    per_h: float


class Window:
    """Counts of each model within the last WINDOW_S seconds, computed as differences from an earlier snapshot."""

    def __init__(self) -> None:
        self._past: deque[tuple[float, Mapping[str, Tally]]] = deque()

    def add(self, shot: Snapshot) -> None:
        """Remember a snapshot, if at least STEP_S have passed since the last remembered snapshot."""
        if not self._past or shot.now - self._past[-1][0] >= STEP_S:
            self._past.append((shot.now, shot.models))
        while len(self._past) > 1 and shot.now - self._past[1][0] >= WINDOW_S:
            self._past.popleft()

    def since(self, name: str, tally: Tally) -> tuple[list[int], int, int]:
        """Return three values of a model within the window: its times to first token as counts by histogram bucket, its
        prompt tokens, and its cached tokens. `tally`: the model's numbers now. All values are 0 at the first
        snapshot."""
        before = self._past[0][1].get(name) if self._past else None
        if before is None:
            before = Tally()
        old = before.ttft or (0,) * len(tally.ttft)
        counts = [max(new - past, 0) for new, past in zip(tally.ttft, old, strict=True)]
        return (
            counts,
            max(tally.prompt_tokens - before.prompt_tokens, 0),
            max(tally.cached_tokens - before.cached_tokens, 0),
        )


class PartMaker:
    """Maker of one gateway process's parts of the console's overview, from snapshots of the process."""

    def __init__(self, gateway: str, process: int, instance: str, recent: RecentCalls) -> None:
        """`gateway`: id of the gateway process. `process`: its number on its host. `instance`: a text that differs
        between processes and does not name the host."""
        self._gateway = gateway
        self._process = process
        self._prefix = f"refused-{instance}-"
        self._recent = recent
        self._window = Window()
        self._looks: deque[Snapshot] = deque(maxlen=3)
        """The last snapshots, the newest last."""
        self._costs: dict[str, _Cost] = {}
        self._ended: dict[int, Row] = {}
        """The rows of ended calls, by the number of the call. These rows never change."""

    def rest(self, shot: Snapshot) -> None:
        """Remember a snapshot for which no part is made, because there are no viewers."""
        self._looks.append(shot)
        self._ended = {}
        self._window.add(shot)

    def _before(self, shot: Snapshot) -> Snapshot:
        """Return the earlier snapshot with which `shot` is compared: the newest one that is at least RATE_S older.
        Without such a snapshot, return `shot` itself."""
        return next((each for each in reversed(self._looks) if shot.now - each.now >= RATE_S), shot)

    async def make(self, shot: Snapshot, limits: LimitUses) -> Part:
        """Return the part that describes a snapshot."""
        before = self._before(shot)
        self._looks.append(shot)
        self._window.add(shot)
        self._costs = {name: cost for name, cost in self._costs.items() if name in shot.tenants}
        interval_s = shot.now - before.now
        tenants = await in_slices(
            self._tenant(name, shot, before, interval_s, limits.of(name)) for name in shot.tenants
        )
        models = await in_slices(self._models(shot, before, interval_s))
        calls = await in_slices(self._calls(shot))
        shot.calls = []  # they must not be kept until the next snapshot
        rate = sum(row["tokens_per_s"] for row in tenants)
        return {
            "format": FORMAT,
            "at": shot.epoch_s,
            "controller_age_s": shot.controller_age_s,
            "controller_gateways": shot.controller_gateways,
            "gateway": {
                "id": self._gateway,
                "age_s": 0.0,
                "streams": sum(tally.running for tally in shot.tenants.values()),
                "queued": sum(tally.waiting for tally in shot.models.values()),
                "lag_ms": _lag_ms(shot, before),
                "tokens_per_s": round(rate, 1),
                "process": self._process,
            },
            "problems": [[one.kind, one.object, one.cause, one.since_s] for one in shot.problems],
            "workers": shot.workers,
            "models": models,
            "tenants": tenants,
            "calls": calls,
        }

    def _models(self, shot: Snapshot, before: Snapshot, interval_s: float) -> Iterator[Row]:
        for row in shot.model_rows:
            tally = shot.models[row["id"]]
            ttft, prompt, cached = self._window.since(row["id"], tally)
            past = before.models.get(row["id"])
            yield row | {
                "running": tally.running,
                "waiting": tally.waiting,
                "tokens_per_s": rate_of(tally.tokens, None if past is None else past.tokens, interval_s),
                "ttft_counts": ttft,
                "prompt_tokens": prompt,
                "cached_tokens": cached,
                "gap": round(tally.gap, 4),
            }

    def _tenant(self, name: str, shot: Snapshot, before: Snapshot, interval_s: float, own: Limits) -> Row:
        tally, past = shot.tenants[name], before.tenants.get(name) or Tally()
        return {
            "id": name,
            "weight": tally.weight,
            "running": tally.running,
            "waiting": tally.waiting,
            "tokens_per_s": rate_of(tally.tokens, past.tokens, interval_s),
            "requests": tally.requests,
            "cost_per_h": self._cost_per_h(name, tally.cost, shot.now),
            "ttft_s": [call.ttft_s for call in self._recent.calls.of(name) if call.ttft_s is not None],
            "limits": own.limits,
            "budget": own.budget,
        }

    def _cost_per_h(self, name: str, cost: float, now: float) -> float:
        """Return the moving average of a tenant's cost per hour. `cost`: the tenant's cost so far."""
        known = self._costs.get(name)
        if known is None:
            if cost:
                self._costs[name] = _Cost(cost, now, 0.0)
            return 0.0
        if (interval_s := now - known.at) > 0:
            rate = max(cost - known.cost, 0.0) / interval_s * 3600
            known.per_h += (rate - known.per_h) * min(interval_s / SMOOTH_S, 1.0)
            known.cost, known.at = cost, now
        return round(known.per_h, 4)

    def _calls(self, shot: Snapshot) -> Iterator[Row]:
        """Yield the rows of open calls, then those of ended calls. The row of an ended call is made only once."""
        for call in fair_choice(shot.calls, MAX_OPEN):
            if call.sequences and _is_open(call):
                yield running_call_row(call, shot.now, shot.epoch_s, self._gateway)
        known, rows = self._ended, {}
        for ended in list(self._recent.calls):
            row = known.get(ended.number)
            if row is None:
                row = ended_call_row(ended, shot.now, shot.epoch_s, self._gateway, self._prefix)
            rows[ended.number] = row
            yield row
        self._ended = rows


def rate_of(total: float, before: float | None, interval_s: float) -> float:
    """Return the rate per second at which a sum grows. `before`: the sum `interval_s` seconds ago; if it is None, the
    rate is 0."""
    if before is None or interval_s <= 0:
        return 0.0
    return round(max(total - before, 0) / interval_s, 1)


def fair_choice(calls: Sequence[Call], most: int) -> Sequence[Call]:
    """Return at most `most` open calls. If there are more, each tenant gets an equal share for its oldest calls. If a
    tenant needs less than its share, the other tenants get the rest."""
    if len(calls) <= most:
        return calls
    by_tenant: dict[str, list[Call]] = {}
    for call in calls:
        by_tenant.setdefault(call.tenant, []).append(call)
    chosen: list[Call] = []
    queues = sorted(by_tenant.values(), key=len)
    for number, queue in enumerate(queues):
        share = (most - len(chosen)) // (len(queues) - number)
        chosen += queue[:share]
    return chosen


def _is_open(call: Call) -> bool:
    """Return whether a call of a snapshot is still open. The sequences of an ended call have lost their references to
    the call."""
    return hasattr(call.sequences[0], "call")


def _lag_ms(shot: Snapshot, before: Snapshot) -> float | None:
    measured = shot.lag[1] - before.lag[1]
    return round((shot.lag[0] - before.lag[0]) / measured * 1000, 2) if measured else None


class LimitUses:
    """The part of its limits and budgets that each tenant has used, at one moment."""

    def __init__(
        self,
        uses: Iterable[tuple[str, str, float]],
        budgets: Iterable[BudgetUse],
        policies: Mapping[str, TenantPolicy],
    ) -> None:
        """`uses`: tuples (tenant, limit, used fraction)."""
        self._policies = policies
        self._uses: dict[str, dict[str, float]] = {}
        self._budgets: dict[str, list[BudgetUse]] = {}
        for tenant, name, ratio in uses:
            self._uses.setdefault(tenant, {})[name] = ratio
        for use in budgets:
            self._budgets.setdefault(use.tenant, []).append(use)

    def of(self, tenant: str) -> Limits:
        """Return a tenant's limits, each with its use (None if unknown), and the budget with the largest used
        fraction."""
        policy, own = self._policies.get(tenant), Limits()
        if policy is None or policy.limits == NO_LIMITS:
            return own
        uses = self._uses.get(tenant, {})
        for name in Limit:
            limit = getattr(policy.limits, name)
            if limit is not None:
                used = round(uses[name] * limit) if name in uses else None
                own.limits[name.value] = {"used": used, "limit": limit}
        for use in sorted(self._budgets.get(tenant, ()), key=lambda use: use.ratio):
            own.limits[use.budget] = {"used": use.used_tokens, "limit": use.limit_tokens}
            own.budget = {"name": use.budget, "used": use.used_tokens, "limit": use.limit_tokens, "currency": "tokens"}
        return own
