"""The scheduler's handler of link events: workers connect and disconnect, workers send reports, and new catalogs
arrive."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from cluster.api.types import CatalogEntry, WorkerIdentity
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.scheduling import queue_errors
from cluster.gateway.scheduling.scheduler import Scheduler
from cluster.link.v1 import link_pb2 as pb
from cluster.observe.metrics import Metrics
from cluster.policy.fairness.peer_backlog import ServedTotal
from cluster.wire.codecs.fairness_codec import FlowBacklog, WeightedValue
from cluster.wire.ended_requests import EndedUsage

STALLED = ("silent", "hung", "deaf", "mute")
"""Link-end reasons after which a reconnecting worker must pass a half-open probe."""
PROVEN_BY_STEPS = ("silent", "hung")
"""Link-end reasons in STALLED after which reported engine steps count as a passed probe, too."""


class LinkObserver(Protocol):
    """An object that is notified when the links of workers begin and end. The methods must not block."""

    def link_up(self, link: WorkerLink) -> None:
        """Handle the beginning of a worker's link."""

    def link_down(self, link: WorkerLink, why: str, now: float) -> None:
        """Handle the end of a worker's link. `now`: monotonic seconds."""


class WorkerEvents:
    """The scheduler's handler of link events. Implements links.hub.HubListener."""

    def __init__(self, scheduler: Scheduler, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._scheduler = scheduler
        self._host = scheduler.host
        self._charges = scheduler.charges
        self._queues = scheduler.queues
        self._metrics = metrics
        self._clock = clock
        self.observers: list[LinkObserver] = []
        """The objects that are notified when workers' links come up and end."""

    def link_up(self, link: WorkerLink) -> None:
        """Handle the beginning of a worker's link: add the worker, and send waiting sequences to it."""
        identity, scheduler = link.identity, self._scheduler
        for call_id, generation in self._host.claimed_calls(identity.model):
            link.box.takeover(call_id, generation)
        self._charges.joined(identity)
        scheduler.policy.losses.returned(link.process)
        self._host.directory.add_link(link)
        scheduler.backlogs.joined(identity.model)
        scheduler.pump.send_waiting(identity.model)
        scheduler.renders.pump(identity.model)
        for observer in self.observers:
            observer.link_up(link)
        self._host.state_changed()

    def link_down(self, link: WorkerLink, why: str) -> None:
        """Handle the end of a worker's link: remove the worker. At this time the worker's sequences have already been
        requeued."""
        identity, now = link.identity, self._clock()
        self._host.directory.remove_link(link)
        self._scheduler.worker_caches.forget(link)
        self._charges.left(identity, now)
        left = link.draining and link.reason == "lost"
        self._metrics.count("worker_detected_total", identity.model, "drained" if left else link.reason)
        if not link.draining:
            unreachable = "" if link.reason == "hung" else link.process
            self._scheduler.policy.losses.lost(link.name, now, unreachable)
        if link.reason in STALLED:
            self._scheduler.breakers.record_stall(link.process, now, link.reason in PROVEN_BY_STEPS)
        for observer in self.observers:
            observer.link_down(link, why, now)
        self._scheduler.pump.send_waiting(identity.model)
        self._scheduler.renders.pump(identity.model)
        self._host.state_changed()

    def link_changed(self, link: WorkerLink) -> None:
        """Handle a change of a worker's credit or drain state: send waiting sequences, first those that move."""
        self._scheduler.moves.move_prepared()
        self._scheduler.pump.send_waiting(link.identity.model)
        self._scheduler.renders.pump(link.identity.model)

    def apply_catalog(self, entries: Sequence[CatalogEntry], revision: int = 0) -> None:
        """Apply a new catalog from the controller. `revision`: number of the catalog, higher for a newer catalog. If it
        is 0, the catalog has no number and no adapters are sent to the workers."""
        directory = self._host.directory
        directory.apply_catalog(entries, revision)
        self._scheduler.canaries.catalog(entries)
        for model in directory.models:  # quarantined workers may take calls again
            self._scheduler.pump.send_waiting(model.name)
        for sequence in self._queues.queued():  # if the model has failed, end the call now, not at its deadline
            known = directory.find(sequence.call.model)
            not_servable = None if known is None else queue_errors.not_servable(known)
            if not_servable is not None:
                sequence.call.fail(not_servable)
        self._scheduler.adapter_checks.changed()
        self._scheduler.renders.end_unservable()
        self._host.state_changed()

    def refusal_of(self, identity: WorkerIdentity) -> str:
        """Return the reason why a worker may not serve its model; "" if the worker may serve."""
        return self._host.directory.refusal_of(identity)

    @property
    def keeps_accounts(self) -> bool:
        """Whether the usage of ended requests is recorded."""
        return self._host.accounting is not None

    # ---- links.worker_link.LinkListener

    def token_gaps(self, model: str) -> Callable[[float, int], None]:
        """Return the function that adds to the model's histogram of times between tokens."""
        return self._metrics.histogram("inter_token_latency_seconds", model).observe

    def step_begun(self, link: WorkerLink, resumed: bool) -> None:
        """Send further sequences, because a worker has begun a step that computes prompts of this gateway. `resumed`:
        whether the step computes prompts of resumed sequences."""
        self._scheduler.pump.step_begun(link.identity.model, resumed)

    def usage(self, link: WorkerLink, ended: Sequence[EndedUsage]) -> None:
        """Handle a worker's report of the usage of ended requests."""
        if self._host.accounting is not None:
            self._host.accounting.usage(link, ended)

    def served(
        self, link: WorkerLink, totals: Sequence[WeightedValue[ServedTotal]], *, continues: bool = False
    ) -> None:
        """Handle a worker's report of the service (weighted tokens) that it has counted for each tenant."""
        self._charges.served(link.identity, totals, self._clock(), continues=continues)

    def peer_backlog(self, link: WorkerLink, gateway: str, waiting: Sequence[WeightedValue[FlowBacklog]]) -> None:
        """Handle a report of what waits at another gateway. A worker has forwarded the report."""
        self._charges.replace_peer_backlog(link.identity.model, gateway, waiting, self._clock())

    def kv_blocks(self, link: WorkerLink, message: pb.KvBlocks) -> None:
        """Handle a worker's report of its KV blocks. Raises ValueError for a malformed report."""
        self._scheduler.worker_caches.report(link, message)

    def drain_state_changed(self, link: WorkerLink) -> None:
        """Handle a change of a worker's drain state."""
        self._host.directory.adapters_changed(link)
        self._host.state_changed()

    def adapters_changed(self, link: WorkerLink) -> None:
        """Handle a worker's report of its adapters: end the calls for an adapter that no worker could load."""
        self._host.directory.adapters_changed(link)
        self._scheduler.adapter_checks.changed()
