"""The search for the faults that one gateway process can see: its own, those of its models and workers, and those that
the controller has reported. policy/problems.py declares the kinds.

A search runs every SEARCH_S and costs some microseconds for each model, adapter and file.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.api.adapters import AdapterState, full_name
from cluster.api.types import ModelState
from cluster.gateway.config_state import MAX_SHOWN, ConfigState
from cluster.gateway.dispatch import Dispatch
from cluster.gateway.foundation import Foundation
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.models.known_model import KnownModel
from cluster.observe.metrics import Metrics, Sample
from cluster.policy.catalog.held import HELD_REASON
from cluster.policy.problems import Finding, Problem, ProblemList, ordered
from cluster.wire.certificate_expiry import CertificateExpiry

SEARCH_S: Final = 2.0
LOST_S: Final = 60.0
"""Seconds for which a lost worker is listed, unless it comes back."""
CRASHES, CRASHES_S = 3, 900.0
"""A model's workers end again and again if CRASHES have ended within CRASHES_S."""
FIRST_CONTROLLER_S, RECONNECT_S, SILENT_S = 30.0, 5.0, 12.0
"""A controller is away if none has connected FIRST_CONTROLLER_S after the gateway's start, none is connected for
RECONNECT_S, or the connected one has sent nothing for SILENT_S, of its frames every two seconds."""
SNAPSHOT_S: Final = 5.0
"""Seconds without an answer to polls for tenants and keys after which the database counts as away."""
SKEW_S: Final = 5.0
CERTIFICATE_DAYS: Final = 21
FREE_RATIO, FREE_BYTES = 0.05, 1 << 30
"""A disk is nearly full if less than both is free."""
LATE_S: Final = 0.25
"""Mean delay of the event loop over a search interval from which a gateway counts as late."""
WINDOW_S, STEP_S = 300.0, 15.0
BURN, MAX_BAD_RATIO, MIN_BAD = 14.4, 0.95, 10
"""Calls of the last WINDOW_S are judged as by the alerts of fast burn: BURN times the error budget, MIN_BAD calls."""
AVAILABILITY: Final = 0.999
_FAILED = frozenset(("internal", "worker_lost", "no_worker", "store_unavailable", "shed", "queue_full"))
_LATE = frozenset(("late_first_token", "slow_tokens"))


class ProblemFinder:
    """The problems that a gateway process finds. An observer of worker events, so that it knows lost workers."""

    def __init__(
        self,
        foundation: Foundation,
        dispatch: Dispatch,
        config_state: ConfigState,
        certificates: CertificateExpiry,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._foundation = foundation
        self._dispatch = dispatch
        self._config_state = config_state
        self.certificates = certificates
        self._wall = wall
        self._clock = time.monotonic
        self._list = ProblemList()
        self._workers = LostWorkerCounts()
        self._calls = RecentOutcomes(foundation.metrics)
        self._lag = 0.0, 0
        self._controller_seen_at = self._clock() + FIRST_CONTROLLER_S - RECONNECT_S
        dispatch.worker_events.observers.append(self._workers)

    @property
    def current(self) -> Sequence[Problem]:
        """The present problems, those of the controller included, the worst first."""
        return ordered([*self._list.current, *self._dispatch.hub.controller.problems])

    def gauges(self) -> Iterator[Sample]:
        """Yield the gauge `problem` of each present problem."""
        for problem in self.current:
            yield "problem", (problem.kind, problem.object, problem.row["hurts"]), 1.0

    async def run(self) -> None:
        """Search until cancelled."""
        while True:
            self.search()
            await asyncio.sleep(SEARCH_S)

    def search(self) -> None:
        """Search once. `current` then has what was found."""
        self._list.update(self.findings(), self._wall())

    def findings(self) -> Iterator[Finding]:
        """Yield what is wrong at this moment, however short it lasts."""
        now = self._clock()
        for model in self._dispatch.directory.models:
            yield from _model(model, self._workers.had(model.name))
        yield from self._workers.findings(now)
        yield from self._calls.findings(self._dispatch.directory.models, now)
        yield from self._stores()
        yield from self._controller(now)
        yield from self._files()
        yield from self._late()

    def _stores(self) -> Iterator[Finding]:
        foundation, accounting = self._foundation, self._dispatch.accounting
        gateway = foundation.gateway_id
        if accounting is not None:
            statistics = accounting.statistics()
            if statistics.error:
                yield Finding("spool_not_written", gateway, f"{statistics.error}; {statistics.pending} records wait")
        if foundation.tenants is not None:
            polls = foundation.tenants.database_polls()
            if polls.age_s > SNAPSHOT_S:
                since = "has not answered yet" if polls.age_s == math.inf else f"no answer for {polls.age_s:.0f} s"
                yield Finding("database_away", gateway, "; ".join(filter(None, (polls.error, since))))
        if foundation.limits.degraded:
            yield Finding("limits_store_away", gateway)

    def _controller(self, now: float) -> Iterator[Finding]:
        controller, gateway = self._dispatch.hub.controller, self._foundation.gateway_id
        if controller.connected:
            self._controller_seen_at = now
            silent_s = 0.0 if controller.heard_at is None else now - controller.heard_at
            if silent_s > SILENT_S:
                yield Finding("controller_away", gateway, f"connected, but silent for {silent_s:.0f} s")
            elif abs(controller.clock_skew_s) > SKEW_S:
                yield Finding("clock_wrong", gateway, f"by {controller.clock_skew_s:+.0f} s")
        elif now - self._controller_seen_at > RECONNECT_S:
            never = controller.heard_at is None
            yield Finding("controller_away", gateway, "none has connected yet" if never else "none is connected")

    def _files(self) -> Iterator[Finding]:
        foundation, now_s = self._foundation, self._wall()
        if problems := self._config_state.problems:
            yield Finding("config_refused", foundation.gateway_id, "; ".join(problems[:MAX_SHOWN]))
        for file, expires_at_s in self.certificates.current():
            left_s = expires_at_s - now_s
            if left_s <= 0:
                yield Finding("certificate_expired", str(file), f"since {-left_s / 3600:.0f} hours")
            elif left_s < CERTIFICATE_DAYS * 86400:
                yield Finding("certificate_expires", str(file), f"in {left_s / 86400:.1f} days")
        try:
            disk = os.statvfs(foundation.folder)
        except OSError as error:
            yield Finding("disk_nearly_full", str(foundation.folder), str(error))
            return
        free = disk.f_bavail * disk.f_frsize
        if free < FREE_BYTES and disk.f_bavail < FREE_RATIO * disk.f_blocks:
            yield Finding("disk_nearly_full", str(foundation.folder), f"{free >> 20} MiB are free")

    def _late(self) -> Iterator[Finding]:
        lag = self._foundation.metrics.histogram("event_loop_lag_seconds")
        (sum_s, count), self._lag = self._lag, (lag.sum, sum(lag.counts))
        if (measured := self._lag[1] - count) and (mean_s := (self._lag[0] - sum_s) / measured) > LATE_S:
            yield Finding("gateway_late", self._foundation.gateway_id, f"by {mean_s:.2f} s on average")


def _model(model: KnownModel, had_workers: bool) -> Iterator[Finding]:
    entry = model.entry
    is_held = HELD_REASON in entry.state_reason
    if is_held:
        yield Finding("model_held", model.name, entry.state_reason)
    elif entry.state is ModelState.FAILED:
        yield Finding("model_failed", model.name, entry.state_reason)
    if had_workers and not model.served and entry.replicas_desired and model.state is not ModelState.DRAINING:
        yield Finding("model_without_workers", model.name, entry.state_reason)
    for share in entry.versions:
        if share.quarantined:
            yield Finding("version_quarantined", f"{model.name}@{share.version}", share.state_reason)
    for spec in model.adapters.specs:
        view = model.adapters.view(spec.name)
        if view.state is AdapterState.FAILED:
            yield Finding("adapter_failed", full_name(model.name, spec.name), view.reason)


@dataclass(frozen=True, slots=True)
class _Loss:
    worker_id: str
    incarnation: str
    why: str
    at: float


class LostWorkerCounts:
    """The unexpected ends of workers within the last CRASHES_S, by model. Implements LinkObserver."""

    def __init__(self) -> None:
        self._losses: dict[str, deque[_Loss]] = {}
        self._had: set[str] = set()
        self._back: set[str] = set()
        """Ids of the lost workers that are linked again, as a process of their own."""

    def had(self, model: str) -> bool:
        """Return whether the model has had a worker since the gateway's start."""
        return model in self._had

    def link_up(self, link: WorkerLink) -> None:
        """Forget the loss if only the link was lost, not the worker."""
        identity = link.identity
        self._had.add(identity.model)
        losses = self._losses.get(identity.model, deque())
        for loss in [loss for loss in losses if loss.worker_id == identity.worker_id]:
            if loss.incarnation == identity.incarnation:
                losses.remove(loss)
            else:
                self._back.add(loss.worker_id)

    def link_down(self, link: WorkerLink, why: str, now: float) -> None:
        """Count the end of a worker that was not draining."""
        if not link.draining:
            identity = link.identity
            losses = self._losses.setdefault(identity.model, deque(maxlen=100))
            losses.append(_Loss(identity.worker_id, identity.incarnation, link.engine_ended or why, now))
            self._back.discard(identity.worker_id)

    def findings(self, now: float) -> Iterator[Finding]:
        """Yield the lost workers, and the models whose workers end again and again."""
        for model, losses in list(self._losses.items()):
            while losses and now - losses[0].at > CRASHES_S:
                self._back.discard(losses.popleft().worker_id)
            if not losses:
                del self._losses[model]
                continue
            if len(losses) >= CRASHES:
                minutes = math.ceil((now - losses[0].at) / 60)
                cause = f"{len(losses)} within {minutes} minutes, the last: {losses[-1].why}"
                yield Finding("workers_crash", model, cause)
            for loss in losses:
                if now - loss.at <= LOST_S and loss.worker_id not in self._back:
                    yield Finding("worker_lost", loss.worker_id, f"of model {model}: {loss.why}")


class RecentOutcomes:
    """The outcomes of the calls of the last minutes, from the metrics, by model."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._past: deque[tuple[float, dict[tuple[str, str], float]]] = deque()

    def findings(self, models: Sequence[KnownModel], now: float) -> Iterator[Finding]:
        """Yield the models whose calls fail or are slow, and the guards that fail."""
        current = self._sums()
        while len(self._past) > 1 and now - self._past[1][0] >= WINDOW_S:
            self._past.popleft()
        before, recent = (self._past[at][1] if self._past else {} for at in (0, max(len(self._past) - 4, 0)))
        if not self._past or now - self._past[-1][0] >= STEP_S:
            self._past.append((now, current))
        for model in models:
            budgets = {"failing_calls": 1 - AVAILABILITY}
            if model.entry.slo_ttft_s or model.entry.slo_itl_s:
                budgets["slow_calls"] = 1 - (model.entry.slo_target or 0.99)
            for kind, budget in budgets.items():
                counts = [self._since(current, past, kind, model.name) for past in (before, recent)]
                (bad, whole), limit = counts[0], min(BURN * budget, MAX_BAD_RATIO)
                if bad >= MIN_BAD and all(part > limit * total for part, total in counts):
                    yield Finding(kind, model.name, f"{bad:.0f} of {whole:.0f} within five minutes")
        for guard in sorted({name for kind, name in current if kind == "guard_fails"}):
            if (failures := self._since(current, recent, "guard_fails", guard)[0]) > 0:
                yield Finding("guard_fails", guard, f"{failures:.0f} times within a minute")

    @staticmethod
    def _since(
        now: dict[tuple[str, str], float], before: dict[tuple[str, str], float], kind: str, name: str
    ) -> tuple[float, float]:
        """Return how many calls of a kind were bad since `before`, and how many there were."""
        total = "judged" if kind == "slow_calls" else "calls"
        return tuple(now.get((each, name), 0) - before.get((each, name), 0) for each in (kind, total))  # type: ignore[return-value]

    def _sums(self) -> dict[tuple[str, str], float]:
        sums: dict[tuple[str, str], float] = {}

        def add(kind: str, name: str, value: float) -> None:
            sums[kind, name] = sums.get((kind, name), 0) + value

        for (model, _, _, outcome), value in self._metrics.counts("requests_total"):
            add("calls", model, value)
            add("failing_calls", model, value if outcome in _FAILED else 0)
        for (model, outcome), value in self._metrics.counts("slo_calls_total"):
            add("judged", model, value)
            add("slow_calls", model, value if outcome in _LATE else 0)
        for (_, guard, outcome), value in self._metrics.counts("guard_actions_total"):
            if outcome.startswith("failed"):
                add("guard_fails", guard, value)
        return sums
