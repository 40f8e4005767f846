"""Queues the sequences of calls, sends them to workers, and queues them again after a loss.

Order and place are decided by policy: the waiting room by the tenants' turns, the router by the workers' capacity. The
scheduler calls them when something has changed, and does what they say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import structlog

from cluster.gateway.calls.call import Call, CallSequence
from cluster.gateway.calls.life import WAITING, State
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.models import KnownModel, ModelDirectory
from cluster.gateway.scheduling import queue_errors
from cluster.gateway.scheduling.binder import Binder
from cluster.gateway.scheduling.canary_statistics import CanaryStatistics
from cluster.gateway.scheduling.peer_backlog import BacklogReports
from cluster.gateway.scheduling.queues import Queues
from cluster.gateway.scheduling.service_charges import ServiceCharges
from cluster.gateway.scheduling.worker_losses import MOST_SILENT, WorkerLosses
from cluster.observe.metrics import Metrics
from cluster.policy.fairness.waiting_room import WaitingRoom
from cluster.policy.routing.version_split import Versions

if TYPE_CHECKING:
    from cluster.gateway.usage.accounting import Accounting

log = structlog.get_logger("dispatch")

SWEEP_S = 1.0


class SchedulerHost(Protocol):
    """What the scheduler needs of its gateway."""

    @property
    def accounting(self) -> Accounting | None:
        """The gateway's accounts; None where none are kept."""

    @property
    def directory(self) -> ModelDirectory:
        """The models."""

    def model_unserved(self) -> None:
        """A call waits for a model that no worker serves, the first of them: the controller may have to start it."""

    def state_changed(self) -> None:
        """A worker or the catalog has changed what the gateway can serve."""

    def claimed_calls(self, model: str) -> Sequence[tuple[str, int]]:
        """Calls of a model that were resumed here, with their generations."""


class Scheduler:
    """The scheduler of one gateway, for all models. Implements calls.call.CallEvents."""

    def __init__(
        self,
        host: SchedulerHost,
        room: WaitingRoom,
        charges: ServiceCharges,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        resume_wait_s: float = 30.0,
        max_silent_losses: int = MOST_SILENT,
    ) -> None:
        """`resume_wait_s`: longest wait of a sequence for a compatible worker. `max_silent_losses`: see
        worker_losses.py."""
        self.host = host
        self.charges = charges
        self.losses = WorkerLosses(max_silent_losses)
        self.canaries = CanaryStatistics()
        self.queues = Queues(room, charges, resume_wait_s, clock)
        self.binder = Binder(self.queues, charges, self.losses, metrics, lambda: host.accounting, clock)
        self.breakers = self.binder.breakers
        self.backlogs = BacklogReports(charges, self.queues.waiting, self.queues.resumed, self.links, clock)
        self._metrics = metrics
        self._clock = clock
        self._unserved: set[str] = set()
        """Models that calls wait for and no worker serves."""
        self._swept = clock()

    # ---- calls

    def enter(self, call: Call, model: KnownModel) -> None:
        """Queue every sequence of a call, and send what has capacity at once. Raises CallError; then nothing is
        queued."""
        hopeless = queue_errors.hopeless(model)
        if hopeless is not None:
            raise hopeless
        starts_in_s = 0.0 if call.deadline is None else self.charges.starts_in_s(call)
        resumed = []
        for sequence in call.sequences:
            if sequence.finish_reason:
                continue
            if sequence.emitted:  # at another gateway, where it had its turn
                self.queues.resume(sequence)
                resumed.append(sequence)
                continue
            self.queues.count(model.name, [sequence])
            admitted = self.queues.admit(sequence, starts_in_s)
            for shed in admitted.shed:
                shed.call.fail(queue_errors.shed())
            if admitted.refusal is not None:
                self.leave(call)
                raise queue_errors.not_let_in(admitted.refusal)
        if len(resumed) < len(call.sequences):
            self.pump(model.name)
        else:
            self._send_resumed(model, resumed)
        self._note_unserved(model)

    def count_missed(self, call: Call, model: KnownModel) -> None:
        """Count a call as demand for the model that was asked for, where its fallback serves it."""
        self.queues.count(model.name, call.sequences)
        self._note_unserved(model)

    def leave(self, call: Call) -> None:
        """A call is over: end its sequences and take them out of the queues and the tenants' accounts."""
        waited = [self.queues.remove(sequence) for sequence in call.sequences]
        call.release()
        for sequence in call.sequences:
            try:
                self._settle(sequence)
            except Exception:  # the other sequences' accounts are to be settled all the same
                log.exception("sequence_not_settled", request_id=call.request_id)
            self.charges.forget(sequence)
        if any(waited):
            self.backlogs.changed(call.model)

    def cut(self, call: Call) -> None:
        """End a call with what it has; sequences that still wait get nothing."""
        for sequence in call.sequences:
            self.queues.remove(sequence)
            sequence.cut()
        call.wake()

    def follow(self, call: Call) -> None:
        """Bring a running call's charges and demand up to date; called a few times a second."""
        for sequence in call.sequences:
            if sequence.finish_reason:
                self._settle(sequence)
            elif sequence.emitted:
                if (place := self.charges.place(sequence)) is not None:
                    self.queues.tally.record_output(place, len(sequence.emitted))
                self.charges.grew(sequence)

    def _settle(self, sequence: CallSequence) -> None:
        if (place := self.charges.place(sequence)) is not None:
            self.queues.tally.ended(place, len(sequence.emitted), sequence.computed)
        self.charges.settle(sequence)

    def take_over(self, call: Call, generation: int) -> None:
        """A call was resumed here: its workers end what they run for earlier readers."""
        for link in self.links(call.model):
            link.box.takeover(call.shown_id, generation)

    # ---- calls.call.CallEvents

    def requeue(self, sequence: CallSequence) -> None:
        """Queue a sequence that has left its worker: one to resume before all others, one to retry at the head of its
        tenant's queue."""
        if sequence.state not in WAITING:  # its call has ended meanwhile
            return
        model = self.host.directory.find(sequence.call.model)
        if sequence.state is State.RESUMING:
            self.queues.resume(sequence)
            if model is not None:
                self._send_resumed(model, (sequence,))
        else:
            self._choose_versions(sequence.call)
            self.queues.put_back(sequence)
            self.pump(sequence.call.model)
        if model is not None:
            self._note_unserved(model)

    def began(self, sequence: CallSequence, cached_tokens: int) -> None:
        """A sequence's first output has come."""
        self.charges.began(sequence, cached_tokens)

    def answered(self, link: WorkerLink) -> None:
        """A worker has sent the first output of a sequence."""
        self.breakers.record_success(link.identity.incarnation)

    def worker_failed(self, link: WorkerLink) -> None:
        """A worker's engine could not continue a sequence."""
        others = (other.identity.incarnation for other in self.links(link.identity.model) if other is not link)
        self.breakers.record_failure(link.identity.incarnation, others, self._clock())

    def resumed(self, model: str, reason: str, gap_s: float) -> None:
        """A sequence was resumed on another worker, after so long without a token."""
        self._metrics.count("resumes_total", model, reason)
        self._metrics.histogram("resume_gap_seconds", model).observe(gap_s)

    def not_taken(self, sequence: CallSequence) -> None:
        """A worker has refused a sequence: that has cost nothing."""
        if self.host.accounting is not None:
            self.host.accounting.refused(sequence)

    def _choose_versions(self, call: Call) -> None:
        """Let a call that has delivered nothing begin at any version with the same tokenizer: its own may have lost its
        last worker."""
        model = self.host.directory.find(call.model)
        if model is None or not call.versions.all or any(one.emitted or one.link for one in call.sequences):
            return
        links = [link for link in model.links.values() if model.takes_calls(link)]
        same = frozenset(link.identity.version for link in links if link.identity.bundle_digest == call.bundle_digest)
        if same:
            call.choose(Versions(call.versions.first if call.versions.first in same else "", same))

    def _note_unserved(self, model: KnownModel) -> None:
        """Report demand for a model that no worker serves now, not with the next report."""
        if model.name not in self._unserved and not model.served:
            self._unserved.add(model.name)
            self.host.model_unserved()

    # ---- sending

    def pump(self, name: str) -> None:
        """Send the waiting sequences of a model while a worker has capacity."""
        model = self.host.directory.find(name)
        if model is None:
            return
        self.binder.send_resumed(model, self.queues.resumed.in_order(name))
        self.binder.send_queued(model)
        self.backlogs.changed(name)

    def _send_resumed(self, model: KnownModel, sequences: Sequence[CallSequence]) -> None:
        """Send these alone: nothing else has changed. After the loss of a gateway or worker they are many, and those
        before them were looked at when they came."""
        self.binder.send_resumed(model, sequences)
        self.backlogs.changed(model.name)

    def step_begun(self, model: str, resumed: bool) -> None:
        """A worker's step has begun with sequences that were sent for it, so that others may follow: those to be
        resumed, and new ones where resumed ones had held them back."""
        if resumed or self.queues.resumed.waiting(model)[0]:
            self.pump(model)

    def links(self, model: str) -> Sequence[WorkerLink]:
        """Links of a model's workers, by worker id."""
        known = self.host.directory.find(model)
        return [] if known is None else [known.links[worker] for worker in sorted(known.links)]

    # ---- time

    def expire(self) -> None:
        """End what has waited too long; called a few times a second."""
        now, directory = self._clock(), self.host.directory
        if now - self._swept >= SWEEP_S:
            self._swept = now
            self._sweep(now)
        new, resumed = self.queues.expired(now, directory.starts_in_s)
        for sequence in new:
            call = sequence.call
            call.fail(queue_errors.too_late(call.model, directory.find(call.model), self._is_late(call)))
        for sequence in resumed:
            sequence.call.fail(queue_errors.not_resumed(len(sequence.emitted), self._is_late(sequence.call)))
        for (
            name
        ) in self.queues.resumed.models:  # a sequence may have waited long enough for the worker of its KV blocks
            self.pump(name)
        if self.breakers.open:  # a pause may be over
            for model in directory.models:
                for link in model.links.values():
                    self.breakers.record_steps(link.identity.incarnation, now, link.load.steps)
                self.pump(model.name)

    def _sweep(self, now: float) -> None:
        models = self.host.directory.models
        self.queues.tally.retain_models(model.name for model in models)
        self._unserved &= {model.name for model in models if not model.served}
        self.charges.sweep({model.name: bool(model.links) for model in models}, now)
        self.breakers.retain(link.identity.incarnation for model in models for link in model.links.values())
        for model in models:
            for link in list(model.links.values()):
                if now >= link.move_requests_at or model.quarantined(link):
                    self.binder.move(link, model)

    def _is_late(self, call: Call) -> bool:
        return call.deadline is not None and self._clock() >= call.deadline
