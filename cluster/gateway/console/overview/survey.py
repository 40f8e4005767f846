"""Snapshots of a gateway process: its open calls, workers and models. A snapshot is taken in slices, and other tasks
run between the slices.

Snapshots add no cost to each token: a snapshot reads the number of tokens so far from each open call, and rates are the
differences of two snapshots.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cluster.gateway.apis.slices import in_slices
from cluster.gateway.call_service import CallService
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.records.token_times import new_tokens
from cluster.gateway.console.overview.lost_workers import LostWorkers
from cluster.gateway.console.overview.recent_calls import CallSums, RecentCalls
from cluster.gateway.console.overview.rows import Row, call_state, model_row, worker_row
from cluster.gateway.gauges import fairness_unit
from cluster.gateway.links.hub import Hub
from cluster.gateway.models.directory import ModelDirectory
from cluster.gateway.scheduling.scheduler import Scheduler
from cluster.observe.metrics import Metrics
from cluster.policy.limits.budgets import BudgetUse
from cluster.policy.problems import Problem
from cluster.policy.tenants.policy import TenantPolicy

TTFT: Final = "time_to_first_token_seconds"
LAG: Final = "event_loop_lag_seconds"
MAX_TENANTS: Final = 1000
"""Maximum number of tenants in an overview: those with open calls first, then those that have made calls."""


@dataclass(slots=True)
class Tally:
    """The numbers of one tenant or model in a snapshot. `tokens` and the other sums are since the start of the process.
    `gap`: for a model, how much the services of its tenants differ, in the fairness units of docs/tenancy.md. `ttft`:
    counts by bucket of the times to first token."""

    running: int = 0
    waiting: int = 0
    requests: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    cost: float = 0.0
    weight: float = 1.0
    gap: float = 0.0
    ttft: tuple[int, ...] = ()
    replicas_wanted: int = 0
    replicas_had: int = 0

    def add(self, sums: CallSums) -> None:
        """Add `sums`, the sums over ended calls, to the numbers of this tally."""
        self.requests += sums.requests
        self.tokens += sums.tokens
        self.prompt_tokens += sums.prompt_tokens
        self.cached_tokens += sums.cached_tokens
        self.cost += sums.cost


@dataclass(slots=True)
class Snapshot:
    """The state of a gateway process at one time. `now`: monotonic seconds, the same moment as `epoch_s`."""

    now: float
    epoch_s: float
    tenants: dict[str, Tally] = field(default_factory=dict)
    models: dict[str, Tally] = field(default_factory=dict)
    workers: list[Row] = field(default_factory=list)
    model_rows: list[Row] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    controller_age_s: float | None = None
    controller_gateways: int | None = None
    """Number of gateway processes to which the controller has links."""
    policies: Mapping[str, TenantPolicy] = field(default_factory=dict)
    problems: Sequence[Problem] = ()
    lag: tuple[float, int] = (0.0, 0)
    """Sum of the delays of the event loop in seconds, and number of measurements, since the start."""


@dataclass(frozen=True, slots=True)
class GatewayParts:
    """The parts of a gateway that a survey reads. `policies`: the policies of all tenants, empty without `auth`.
    `budgets`: the uses of the tenants' budgets."""

    hub: Hub
    directory: ModelDirectory
    scheduler: Scheduler
    service: CallService
    metrics: Metrics
    recent: RecentCalls
    lost: LostWorkers
    utilization: Callable[[], Iterator[tuple[str, str, float]]]
    policies: Callable[[], Mapping[str, TenantPolicy]] = dict
    budgets: Callable[[], Sequence[BudgetUse]] = tuple
    problems: Callable[[], Sequence[Problem]] = tuple
    wall: Callable[[], float] = time.time


class Survey:
    """Takes snapshots of one gateway process."""

    def __init__(self, parts: GatewayParts) -> None:
        self._parts = parts

    async def look(self, with_rows: bool = True) -> Snapshot:
        """Take a snapshot of the present state. `with_rows`: whether to make the rows of workers and models, too."""
        parts = self._parts
        now = parts.service.clock()
        shot = Snapshot(now, parts.wall())
        await in_slices(self._calls(shot))
        await in_slices(self._tenants(shot))
        await in_slices(self._models(shot))
        if with_rows:
            shot.workers = await in_slices(self._workers(now))
            starting = {worker.model: worker for worker in parts.hub.starting.current}
            shot.model_rows = await in_slices(
                model_row(model, starting, shot.epoch_s) for model in parts.directory.models
            )
        heard = parts.hub.controller.heard_at
        shot.controller_age_s = None if heard is None else max(time.monotonic() - heard, 0.0)
        shot.controller_gateways = parts.hub.controller.gateways or None
        shot.problems = parts.problems()
        lag = parts.metrics.histogram(LAG)
        shot.lag = (lag.sum, sum(lag.counts))
        return shot

    def _calls(self, shot: Snapshot) -> Iterator[None]:
        """Add each open call to the snapshot, and count it for its tenant and its model. Yields None after each call,
        so that the caller can let other tasks run."""
        for call in self._parts.service.calls:
            if not call.sequences:
                continue
            shot.calls.append(call)
            tenant = shot.tenants.get(call.tenant)
            if tenant is None:
                tenant = shot.tenants[call.tenant] = Tally(weight=call.policy.weight)
            model = shot.models.get(call.model)
            if model is None:
                model = shot.models[call.model] = Tally()
            tokens = 0 if call.is_pooling else new_tokens(call)
            tenant.tokens += tokens
            model.tokens += tokens
            if call_state(call) == "queued":
                tenant.waiting += 1
            else:
                tenant.running += 1
                model.running += 1
            yield None

    def _tenants(self, shot: Snapshot) -> Iterator[None]:
        """Complete the tenants of a snapshot: add the sums over their ended calls, and add the tenants without open
        calls. Yields None after each tenant, so that other tasks can run in between."""
        parts, tenants = self._parts, shot.tenants
        shot.policies = policies = parts.policies()
        for name, sums in list(parts.recent.tenants.items()):
            if (tally := tenants.get(name)) is None:
                if len(tenants) >= MAX_TENANTS:
                    continue
                tally = tenants[name] = Tally()
            tally.add(sums)
            yield None
        for name, policy in policies.items():
            if (tally := tenants.get(name)) is None:
                if len(tenants) >= MAX_TENANTS:
                    continue
                tally = tenants[name] = Tally()
            tally.weight = policy.weight
            yield None

    def _models(self, shot: Snapshot) -> Iterator[None]:
        """Complete the models of a snapshot, and yield after each model, so that other tasks can run. Adds the sums
        over ended calls, the lengths of the queues, the times to first token and the numbers of replicas. Models that
        are no longer known are removed."""
        parts, scheduler = self._parts, self._parts.scheduler
        known = {model.name for model in parts.directory.models}
        shot.models = {name: tally for name, tally in shot.models.items() if name in known}
        for model in parts.directory.models:
            name = model.name
            tally = shot.models.setdefault(name, Tally())
            if (sums := parts.recent.models.get(name)) is not None:
                tally.add(sums)
            tally.waiting = scheduler.queues.waiting(name)[0] + scheduler.renders.waiting(name)[0]
            tally.gap = scheduler.charges.statistics.spreads.get(name, 0.0) / fairness_unit(model)
            tally.ttft = parts.metrics.histogram_counts(TTFT, name)
            tally.replicas_wanted, tally.replicas_had = model.entry.replicas_desired, len(model.links)
            yield None

    def _workers(self, now: float) -> Iterator[Row]:
        """Yield the rows of the linked workers and of the workers that were lost recently."""
        parts = self._parts
        linked = set()
        gateway, epoch_s = parts.hub.gateway_id, parts.wall()
        for link in parts.hub.links:
            linked.add(link.identity.worker_id)
            row = worker_row(link)
            row["links"] = (gateway,)
            yield row
        for lost in parts.lost.current(now):
            if lost.row["id"] not in linked:
                yield lost.row | {"lost_at": round(epoch_s - (now - lost.at), 3), "resumed": lost.resumed}
