"""Sending of sequences to workers: a gateway's scheduler, links, models, usage accounting and resumes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from cluster.config.schema import Config
from cluster.gateway import optional_parts
from cluster.gateway.demand_reports import DemandReports
from cluster.gateway.foundation import Foundation
from cluster.gateway.links.hub import Hub
from cluster.gateway.models.directory import ModelDirectory
from cluster.gateway.models.known_model import KnownModel
from cluster.gateway.scheduling.scheduler import Scheduler
from cluster.gateway.scheduling.service_charges import ServiceCharges
from cluster.gateway.scheduling.worker_events import WorkerEvents
from cluster.policy.fairness.waiting_room import Order, WaitingRoom
from cluster.wire.dial import Timing


class Dispatch:
    """The scheduler of a gateway, and the parts that the scheduler works with.

    The parts depend on each other: the links report to the scheduler, and the scheduler reads the directory, which gets
    tokenizer bundles over the links. The scheduler therefore gets this object, as its SchedulerHost
    (scheduling/scheduler.py), and reads the object's attributes only after the first link or call.
    """

    def __init__(
        self,
        foundation: Foundation,
        timing: Timing | None,
        usage_store: optional_parts.UsageStore | None,
        on_models_changed: Callable[[Iterable[KnownModel]], None] | None,
    ) -> None:
        """`usage_store`: where usage records are written; None for the ledger that the configuration names.
        `on_models_changed`: called with all models after each change of the models that the gateway can serve."""
        config, metrics, tenants = foundation.config, foundation.metrics, foundation.tenants
        self._on_models_changed = on_models_changed
        ranks = {entry.name: entry.rank for entry in config.classes}
        known = (lambda handle: None) if tenants is None else (lambda handle: tenants.derived.weights.get(handle))
        self.charges = ServiceCharges(ranks, metrics, known)
        self.scheduler = self._scheduler(foundation)
        self.worker_events = WorkerEvents(self.scheduler, metrics)
        self.demand = DemandReports(self.scheduler)
        self.hub = Hub(
            foundation.gateway_id,
            self.worker_events,
            self.demand.current,
            self.scheduler.canaries.tallies,
            timing,
            config.gateway.siblings(foundation.process),
            config.gateway.link_tls is not None,
            foundation.folder,
        )
        self.directory = ModelDirectory(foundation.folder, self.hub.bundles.fetch)
        self.accounting = optional_parts.accounting(tenants, usage_store, self.hub, foundation.folder / "usage")
        self.resumes = optional_parts.resume_service(
            config, tenants, foundation.shared_limits, self.scheduler.take_over, self.hub.incarnation
        )

    def _scheduler(self, foundation: Foundation) -> Scheduler:
        config, charges = foundation.config, self.charges
        return Scheduler(
            self,
            self._waiting_room(config, charges.fair.order),
            charges,
            foundation.metrics,
            resume_wait_s=config.gateway.resume.max_wait_s,
            max_silent_losses=config.gateway.resume.max_silent_losses,
            render_room_of=partial(self._waiting_room, config),
            routing=config.routing.settings(),
            hedging_share=config.routing.hedging.share,
        )

    def _waiting_room(self, config: Config, order_of: Callable[[str], Order]) -> WaitingRoom:
        queue = config.gateway.queue
        return WaitingRoom(
            max_requests=queue.max_requests,
            max_tokens=queue.max_tokens,
            max_wait_s=queue.max_wait_s,
            order_of=order_of,
            weight_of=self.charges.weight_of,
            tenant_max_requests=queue.tenant_max_requests,
            tenant_max_tokens=queue.tenant_max_tokens,
            longer_s=lambda model: self.directory.starts_in_s(model),
        )

    # ---- scheduling.scheduler.SchedulerHost

    def gateway_count(self) -> int:
        """Implements `SchedulerHost.gateway_count`."""
        return self.hub.controller.gateways

    def model_unserved(self) -> None:
        """Report the demand to the controller now, because a call waits for a model that no worker serves."""
        self.hub.controller.report_now()

    def state_changed(self) -> None:
        """Implements `SchedulerHost.state_changed`."""
        if self._on_models_changed is not None:
            self._on_models_changed(self.directory.models)

    def claimed_calls(self, model: str) -> Sequence[tuple[str, int]]:
        """Implements `SchedulerHost.claimed_calls`."""
        return self.resumes.taken_over(model)
