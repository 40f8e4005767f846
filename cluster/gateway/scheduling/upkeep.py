"""The scheduler's periodic work: it ends calls that have waited too long, moves sequences away from draining workers,
and forgets state that is no longer needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cluster.gateway.models.directory import ModelDirectory
from cluster.gateway.scheduling.adapter_checks import AdapterChecks
from cluster.gateway.scheduling.chat_renders import ChatRenders
from cluster.gateway.scheduling.executor import Executor
from cluster.gateway.scheduling.hedges import Hedges
from cluster.gateway.scheduling.moves import Moves
from cluster.gateway.scheduling.pump import SequencePump, UnservedModels
from cluster.gateway.scheduling.queues import Queues
from cluster.gateway.scheduling.service_charges import ServiceCharges
from cluster.gateway.scheduling.worker_caches import WorkerCaches
from cluster.gateway.scheduling.workers import ModelFleets
from cluster.policy.routing.breaker import Breakers
from cluster.policy.scheduling.scheduling_policy import SchedulingPolicy

SWEEP_S: Final = 1.0


class Upkeep:
    """The periodic work of one gateway's scheduler."""

    def __init__(
        self,
        directory: Callable[[], ModelDirectory],
        policy: SchedulingPolicy,
        queues: Queues,
        executor: Executor,
        pump: SequencePump,
        unserved: UnservedModels,
        adapter_checks: AdapterChecks,
        fleets: ModelFleets,
        caches: WorkerCaches,
        breakers: Breakers,
        charges: ServiceCharges,
        hedges: Hedges,
        moves: Moves,
        renders: ChatRenders,
        clock: Callable[[], float],
    ) -> None:
        """`directory` returns the gateway's models."""
        self._directory = directory
        self._policy = policy
        self._queues = queues
        self._executor = executor
        self._pump = pump
        self._unserved = unserved
        self._adapter_checks = adapter_checks
        self._fleets = fleets
        self._caches = caches
        self._breakers = breakers
        self._charges = charges
        self._hedges = hedges
        self._moves = moves
        self._renders = renders
        self._clock = clock
        self._swept = clock()

    def expire(self) -> None:
        """End calls that have waited too long, and do the other periodic work that is due. Called a few times a
        second."""
        now, directory = self._clock(), self._directory()
        if now - self._swept >= SWEEP_S:
            self._swept = now
            self._sweep(now)
        self._caches.maintain(now)
        self._adapter_checks.go_on()
        self._moves.move_prepared()
        ends = self._policy.expire(now, directory.starts_in_s)
        late = {self._queues.sequence(end.key).call.model for end in ends}
        self._executor.carry_out(ends)
        self._renders.expire()
        # A sequence may have waited long enough for the worker that holds its KV blocks, or behind one that has ended.
        for name in {*self._policy.resuming.models, *self._policy.aside.models, *late}:
            self._pump.send_waiting(name)
        if self._breakers.open:  # a worker's pause may be over
            for model in directory.models:
                for link in model.links.values():
                    self._breakers.record_steps(link.process, now, link.load.steps)
                self._pump.send_waiting(model.name)

    def _sweep(self, now: float) -> None:
        """Forget the state of models and workers that no longer exist. Move sequences away from workers that drain or
        whose version is quarantined."""
        models = self._directory().models
        self._queues.tally.retain_models(model.name for model in models)
        self._unserved.retain(models)
        self._renders.sweep((model.name for model in models), now)
        self._hedges.policy.retain_models(model.name for model in models)
        self._fleets.age(now)
        self._charges.sweep({model.name: bool(model.links) for model in models}, now)
        linked = (link.process for model in models for link in model.links.values())
        self._breakers.retain(linked, now)
        for model in models:
            for link in list(model.links.values()):
                is_bad = model.versions.is_quarantined(link)
                if is_bad or now >= link.move_requests_at:
                    self._moves.move_all(link, at_once=is_bad)
