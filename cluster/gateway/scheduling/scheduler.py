"""The scheduler, which queues the sequences of calls, sends sequences to workers, and queues sequences again after the
loss of a worker.

policy/scheduling decides which sequence goes to which worker. The scheduler asks the policy when something has changed,
and the executor carries out the policy's instructions.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import structlog

from cluster.gateway.calls.call import Call, CallSequence
from cluster.gateway.calls.sequences.life import WAITING, State
from cluster.gateway.calls.sequences.linked_sequence import LinkedSequence
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.models import KnownModel, ModelDirectory
from cluster.gateway.scheduling import queue_errors
from cluster.gateway.scheduling.adapter_checks import AdapterChecks
from cluster.gateway.scheduling.canary_statistics import CanaryStatistics
from cluster.gateway.scheduling.chat_renders import ChatRenders, small_room
from cluster.gateway.scheduling.executor import Executor
from cluster.gateway.scheduling.hedges import Hedges
from cluster.gateway.scheduling.peer_backlog import BacklogReports
from cluster.gateway.scheduling.queues import Queues
from cluster.gateway.scheduling.routes import Routes
from cluster.gateway.scheduling.service_charges import ServiceCharges
from cluster.gateway.scheduling.worker_caches import WorkerCaches
from cluster.gateway.scheduling.workers import LinkedWorkers
from cluster.observe.metrics import Metrics
from cluster.policy.fairness.waiting_room import Order, WaitingRoom
from cluster.policy.routing.breaker import Breakers
from cluster.policy.routing.cost import RoutingSettings
from cluster.policy.routing.version_split import Versions
from cluster.policy.scheduling.hedging import HedgingPolicy
from cluster.policy.scheduling.instructions import ResumingSequence
from cluster.policy.scheduling.scheduling_policy import SchedulingPolicy, Workers
from cluster.policy.scheduling.worker_losses import MOST_SILENT, WorkerLosses

if TYPE_CHECKING:
    from cluster.gateway.usage.accounting import Accounting

log = structlog.get_logger("dispatch")

SWEEP_S = 1.0
SLICE = 64
"""Number of sequences of one call that are queued at once, which takes about 3 ms."""


class SchedulerHost(Protocol):
    """Interface of a gateway that the scheduler needs."""

    @property
    def accounting(self) -> Accounting | None:
        """The gateway's accounts; None if the gateway keeps no accounts."""

    @property
    def directory(self) -> ModelDirectory:
        """Directory of the models that the gateway knows."""

    def model_unserved(self) -> None:
        """Handle the first waiting call for a model that no worker serves. The controller may have to start the
        model."""

    def state_changed(self) -> None:
        """Handle a change of the models that the gateway can serve."""

    def claimed_calls(self, model: str) -> Sequence[tuple[str, int]]:
        """Return the ids of a model's calls that were resumed at this gateway, each with its generation."""


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
        policy_of: Callable[[WaitingRoom, Workers, float, WorkerLosses], SchedulingPolicy] = SchedulingPolicy,
        render_room_of: Callable[[Callable[[str], Order]], WaitingRoom] = small_room,
        routing: RoutingSettings | None = None,
        hedging_share: float = 0.0,
    ) -> None:
        """`resume_wait_s`: longest wait, in seconds, of a sequence for a compatible worker. `max_silent_losses`: see
        policy/scheduling/worker_losses.py. `policy_of` creates the policy; a test may record what the policy does.
        `render_room_of`: see ChatRenders. `routing`: the policy for new calls. `hedging_share`: see HedgingPolicy."""
        self.host = host
        self.charges = charges
        self.canaries = CanaryStatistics(metrics)
        self.breakers = Breakers()
        self.worker_caches = WorkerCaches()
        workers = LinkedWorkers(
            host, self.breakers, self.worker_caches, lambda key: self.queues.sequence(key).request, routing
        )
        self.routes = Routes(metrics, workers.count, clock)
        self.policy = policy_of(room, workers, resume_wait_s, WorkerLosses(max_silent_losses))
        self.queues = Queues(self.policy, charges, clock)
        self._adapter_checks = AdapterChecks(self.queues.queued, self._check_adapter)
        self.renders = ChatRenders(
            render_room_of,
            charges.weight_of,
            self.queues.tally,
            lambda name: host.directory.find(name),
            clock,
            self._note_unserved,
        )
        self.hedges = Hedges(
            HedgingPolicy(hedging_share),
            self.queues,
            workers,
            self.worker_caches,
            self.breakers,
            metrics,
            self.routes,
            charges.place,
            lambda: host.accounting,
            clock,
        )
        self._executor = Executor(
            self.queues,
            workers,
            self.worker_caches,
            self.breakers,
            self.hedges,
            metrics,
            self.routes,
            lambda: host.directory,
            lambda: host.accounting,
            clock,
        )
        self.links, self._age_workers = workers.links, workers.age
        self.backlogs = BacklogReports(charges, self.queues.waiting, self.policy.resuming, workers.links, clock)
        self._metrics = metrics
        self._clock = clock
        self._unserved: set[str] = set()
        """Names of models that no worker serves and for which calls wait."""
        self._swept = clock()

    # ---- calls

    async def enter_in_slices(self, call: Call, model: KnownModel) -> None:
        """Queue the sequences of a call with many, as `enter` does, in slices between which other tasks run."""
        starts_in_s = 0.0 if call.deadline is None else self.charges.starts_in_s(call)
        for at in range(0, len(call.sequences), SLICE):
            if at:
                await asyncio.sleep(0)
            if call.error is not None:  # since the last slice
                raise call.error
            self.enter(call, model, call.sequences[at : at + SLICE], starts_in_s)

    def enter(
        self,
        call: Call,
        model: KnownModel,
        some: Sequence[CallSequence] | None = None,
        starts_in_s: float | None = None,
    ) -> None:
        """Queue every sequence of a call, and send the sequences for which a worker has capacity. Raises CallError;
        then no sequence of the call is queued. `some`: the sequences to queue, if not all. `starts_in_s`: seconds until
        the earliest possible start, if it is known."""
        not_servable = queue_errors.not_servable(model, call.adapter)
        if not_servable is not None:
            raise not_servable
        if starts_in_s is None:
            starts_in_s = 0.0 if call.deadline is None else self.charges.starts_in_s(call)
        sequences = call.sequences if some is None else some
        resumed: list[ResumingSequence] = []
        for sequence in sequences:
            if sequence.finish_reason:
                continue
            if sequence.emitted:  # at another gateway, where the sequence passed the waiting room
                resumed.append(self.queues.resume(sequence))
                continue
            self.queues.count(model.name, [sequence])
            admitted = self.queues.admit(sequence, starts_in_s)
            for shed in admitted.shed:
                shed.call.fail(queue_errors.shed())
            if admitted.refusal is not None:
                self.leave(call)
                raise queue_errors.refused(admitted.refusal)
        if len(resumed) < len(sequences):
            self.pump(model.name)
        else:
            self._send_resumed(model, resumed)
        self._note_unserved(model)

    def count_missed(self, call: Call, model: KnownModel) -> None:
        """Count a call as demand for the requested model, although a fallback model serves the call."""
        self.queues.count(model.name, call.sequences)
        self._note_unserved(model)

    def leave(self, call: Call) -> None:
        """End the sequences of a call, remove the sequences from the queues, and settle their service accounts."""
        waited = [self.queues.remove(sequence) for sequence in call.sequences]
        call.release()
        for sequence in call.sequences:
            try:
                self._settle(sequence)
            except Exception:  # settle the other sequences' accounts all the same
                log.exception("call.sequence_not_settled", **call.log_fields)
            self.hedges.forget(sequence)
            self.charges.forget(sequence)
        if any(waited):
            self.backlogs.changed(call.model)

    def cut(self, call: Call) -> None:
        """Finish a call with the tokens that it has so far. Sequences that are still queued finish without tokens."""
        for sequence in call.sequences:
            self.queues.remove(sequence)
            sequence.cut()
        call.output.wake()

    def follow(self, call: Call) -> None:
        """Update the charges and the demand of a running call. Called a few times a second. A pooling call's sequences
        do not grow."""
        if call.is_pooling:
            return
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
        """Send all workers the new generation of a call that was resumed at this gateway, so that they end the call's
        sequences of earlier generations."""
        for link in self.links(call.model):
            link.box.takeover(call.shown_id, generation)

    # ---- calls.call.CallEvents

    def requeue(self, sequence: CallSequence) -> None:
        """Queue a sequence that has left its worker. A sequence that starts over is put at the head of its tenant's
        queue, any other sequence into the resume queue."""
        if sequence.state not in WAITING:  # the call has ended in the meantime
            return
        model = self.host.directory.find(sequence.call.model)
        if sequence.state is State.RESUMING:
            resumed = self.queues.resume(sequence)
            if model is not None:
                self._send_resumed(model, (resumed,))
        else:
            self._choose_versions(sequence.call)
            try:
                if model is not None and (key := self._new_adapter(sequence, model)) is not None:
                    sequence.call.set_adapter(sequence, key)
                    self.worker_caches.forget_prompt(sequence.key)
            except Exception as error:
                sequence.call.fail_unexpectedly(error)
                return
            self.queues.put_back(sequence)
            self.pump(sequence.call.model)
        if model is not None:
            self._note_unserved(model)

    def began(self, sequence: CallSequence, cached_tokens: int) -> None:
        """Correct the charge of a sequence when its first output has arrived, and count its prediction."""
        self.charges.began(sequence, cached_tokens)
        self.routes.began(sequence, cached_tokens)
        self.hedges.answered(sequence, cached_tokens)

    def answered(self, link: WorkerLink) -> None:
        """Record a success of a worker, which has sent the first output of a sequence."""
        self.breakers.record_success(link.identity.incarnation)

    def worker_failed(self, link: WorkerLink) -> None:
        """Record a failure of a worker whose engine could not continue a sequence."""
        others = (other.identity.incarnation for other in self.links(link.identity.model) if other is not link)
        self.breakers.record_failure(link.identity.incarnation, others, self._clock())

    def resumed(self, model: str, reason: str, gap_s: float) -> None:
        """Count a resume that came `gap_s` seconds after the sequence's last token."""
        self._metrics.count("resumes_total", model, reason)
        self._metrics.histogram("resume_gap_seconds", model).observe(gap_s)

    def submission_refused(self, sequence: CallSequence) -> None:
        """Stop waiting for the usage of a Submit that a worker refused. A refused Submit costs nothing."""
        if self.host.accounting is not None:
            self.host.accounting.refused(sequence)

    def finished(self, sequence: CallSequence) -> None:
        """Settle the service account of one of many sequences of a call, since its call may go on for long."""
        self._settle(sequence)

    def hedge_ended(self, sequence: CallSequence, won: bool, computed_by: str) -> None:
        """Record that one of the two workers of a hedged sequence is out."""
        self.hedges.ended(sequence, won, computed_by)

    def adapters_changed(self) -> None:
        """End the queued calls for adapters that no worker could load or that are gone, and have the others use the
        digests that count now. If many are queued, the last ones follow a little later."""
        self._adapter_checks.changed()

    def _check_adapter(self, sequence: CallSequence) -> None:
        call, model = sequence.call, self.host.directory.find(sequence.call.model)
        if model is None:
            return
        try:
            if (refused := queue_errors.not_servable(model, call.adapter)) is not None:
                call.fail(refused)
            elif (key := self._new_adapter(sequence, model)) is not None:
                self.queues.set_adapter(sequence, key)
                self.worker_caches.forget_prompt(sequence.key)
        except Exception as error:
            call.fail_unexpectedly(error)

    @staticmethod
    def _new_adapter(sequence: CallSequence, model: KnownModel) -> str | None:
        """Return the adapter that a sequence without output should use in place of the one in its request, which no
        worker has; None if it should keep that one."""
        now, key = sequence.request.adapter, model.adapters.key(sequence.call.adapter)
        is_stale = bool(now) and now != key and not sequence.emitted and not model.adapters.is_ready(now)
        return key if is_stale and model.adapters.find(sequence.call.adapter) is not None else None

    def _choose_versions(self, call: Call) -> None:
        """Allow a call that has delivered nothing to begin on any version with the same tokenizer, because the call's
        own version may have lost its last worker."""
        model = self.host.directory.find(call.model)
        begun = any(sequence.emitted or sequence.link or sequence.finish_reason for sequence in call.sequences)
        if model is None or not call.versions.all or begun:
            return
        links = [link for link in model.links.values() if model.takes_calls(link)]
        same = frozenset(link.identity.version for link in links if link.identity.bundle_digest == call.bundle_digest)
        if same:
            call.set_versions(Versions(call.versions.first if call.versions.first in same else "", same))
            self.queues.versions_changed(call)

    def _note_unserved(self, model: KnownModel) -> None:
        """If no worker serves a model, report the demand for the model at once, not with the next periodic report."""
        if model.name not in self._unserved and not model.served:
            self._unserved.add(model.name)
            self.host.model_unserved()

    # ---- sending

    def pump(self, name: str) -> None:
        """Send waiting sequences of a model as long as a worker has capacity."""
        if self.host.directory.find(name) is None:
            return
        self._executor.carry_out(self.policy.assign(name, self._clock()))
        self.backlogs.changed(name)

    def _send_resumed(self, model: KnownModel, sequences: Sequence[ResumingSequence]) -> None:
        """Try to send only `sequences`, since nothing else has changed. After the loss of a gateway or worker many
        sequences are requeued. If the whole queue were tried for each of these sequences, the cost would be the square
        of their number."""
        self._executor.carry_out(self.policy.assign_resumed(model.name, sequences, self._clock()))
        self.backlogs.changed(model.name)

    def step_begun(self, model: str, resumed: bool) -> None:
        """Send further sequences after a worker's step has begun, since prefill pacing now allows more. `resumed`:
        whether the step computes resumed sequences. New sequences may have waited behind these."""
        if resumed or self.policy.resuming.waiting(model)[0]:
            self.pump(model)

    # ---- time

    def expire(self) -> None:
        """End calls that have waited too long. Called a few times a second."""
        now, directory = self._clock(), self.host.directory
        if now - self._swept >= SWEEP_S:
            self._swept = now
            self._sweep(now)
        self.worker_caches.maintain(now)
        self._adapter_checks.go_on()
        self._executor.carry_out(self.policy.expire(now, directory.starts_in_s))
        self.renders.expire()
        # A sequence may have waited long enough for the worker that holds its KV blocks.
        for name in {*self.policy.resuming.models, *self.policy.aside.models}:
            self.pump(name)
        if self.breakers.open:  # a worker's pause may be over
            for model in directory.models:
                for link in model.links.values():
                    self.breakers.record_steps(link.identity.incarnation, now, link.load.steps)
                self.pump(model.name)

    def _sweep(self, now: float) -> None:
        models = self.host.directory.models
        self.queues.tally.retain_models(model.name for model in models)
        self._unserved &= {model.name for model in models if not model.served}
        self.renders.sweep((model.name for model in models), now)
        self.hedges.policy.retain_models(model.name for model in models)
        self._age_workers(now)
        self.charges.sweep({model.name: bool(model.links) for model in models}, now)
        self.breakers.retain(link.identity.incarnation for model in models for link in model.links.values())
        for model in models:
            for link in list(model.links.values()):
                if now >= link.move_requests_at or model.quarantined(link):
                    self._move(link, now)

    def _move(self, link: WorkerLink, now: float) -> None:
        """Move sequences from a draining worker to other workers, as many as the other workers have capacity for now.
        The remaining sequences are moved by later calls."""
        sequences = {sink.key: sink for sink in link.sinks if isinstance(sink, LinkedSequence)}
        running = [self.queues.resuming(sequence) for sequence in sequences.values()]
        for key in self.policy.movable(running, link.identity.worker_id, now):
            try:
                sequences[key].move()
            except Exception as error:
                sequences[key].call.fail_unexpectedly(error)
