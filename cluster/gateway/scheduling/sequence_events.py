"""The scheduler's handler of sequence events: from the first output of a sequence to its end or its return to a
queue."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import TYPE_CHECKING

from cluster.api.outcomes import CallError
from cluster.gateway.calls.call import Call, CallSequence
from cluster.gateway.calls.sequences.life import WAITING, State
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.models.known_model import KnownModel
from cluster.gateway.scheduling.adapter_checks import current_adapter
from cluster.gateway.scheduling.hedges import Hedges
from cluster.gateway.scheduling.pump import SequencePump, UnservedModels
from cluster.gateway.scheduling.queues import Queues
from cluster.gateway.scheduling.routes import Routes
from cluster.gateway.scheduling.service_charges import ServiceCharges
from cluster.gateway.scheduling.worker_caches import WorkerCaches
from cluster.observe.metrics import Metrics
from cluster.policy.routing.breaker import Breakers
from cluster.policy.routing.version_split import Versions

if TYPE_CHECKING:
    from cluster.gateway.usage.open_accounts import OpenAccounts


class SequenceEvents:
    """The scheduler's handler of sequence events in one gateway, for all models. Implements
    calls.sequences.owner.CallEvents."""

    def __init__(
        self,
        find: Callable[[str], KnownModel | None],
        queues: Queues,
        charges: ServiceCharges,
        pump: SequencePump,
        unserved: UnservedModels,
        caches: WorkerCaches,
        routes: Routes,
        hedges: Hedges,
        breakers: Breakers,
        links: Callable[[str], Sequence[WorkerLink]],
        metrics: Metrics,
        accounts: Callable[[], OpenAccounts | None],
        clock: Callable[[], float],
    ) -> None:
        """`find`: returns a model by name. `links`: returns the links of a model's workers. `accounts`: returns the
        gateway's accounts, or None if the gateway keeps no accounts."""
        self._find = find
        self._queues = queues
        self._charges = charges
        self._pump = pump
        self._unserved = unserved
        self._caches = caches
        self._routes = routes
        self._hedges = hedges
        self._breakers = breakers
        self._links = links
        self._metrics = metrics
        self._accounts = accounts
        self._clock = clock

    def requeue(self, sequence: CallSequence) -> None:
        """Queue a sequence that has left its worker. A sequence that must start over is put ahead of all sequences that
        were never sent. A sequence that can continue is put into the resume queue."""
        if sequence.state not in WAITING:  # the call has ended in the meantime
            return
        model = self._find(sequence.call.model)
        if sequence.state is State.RESUMING:
            resumed = self._queues.resume(sequence)
            if model is not None:
                self._pump.send_resumed(model.name, (resumed,))
        else:
            call = sequence.call
            self._choose_versions(call, model)
            try:
                if model is not None and call.adapter:
                    # The report that the adapter has failed may have come before the worker's refusal.
                    if (refused := model.adapters.refusal_of(model.name, call.adapter)) is not None:
                        call.fail(refused)
                        return
                    if (key := current_adapter(sequence, model)) is not None:
                        call.set_adapter(sequence, key)
                        self._caches.forget_prompt(sequence.key)
            except CallError as error:
                call.fail(error)
                return
            except Exception as error:
                call.fail_unexpectedly(error)
                return
            self._queues.put_back(sequence)
            self._pump.send_waiting(call.model)
        if model is not None:
            self._unserved.note(model)

    def _choose_versions(self, call: Call, model: KnownModel | None) -> None:
        """Allow a call without output to begin on any version with the same tokenizer. This is needed if the last
        worker of the version that was chosen for the call is lost."""
        begun = any(sequence.emitted or sequence.link or sequence.finish_reason for sequence in call.sequences)
        if model is None or begun or not (call.versions.all or call.versions.has_begun):
            return
        links = [link for link in model.links.values() if model.takes_calls(link)]
        same = frozenset(link.identity.version for link in links if link.identity.bundle_digest == call.bundle_digest)
        if same:
            first = call.versions.first if call.versions.first in same else ""
            call.set_versions(Versions(first, same, bundle_digest=call.bundle_digest))
            self._queues.versions_changed(call)

    def began(self, sequence: CallSequence, cached_tokens: int) -> None:
        """Handle the first output of a sequence: correct the sequence's service charge, compare the predicted cached
        tokens with `cached_tokens`, and end the watch for a late first token."""
        self._charges.began(sequence, cached_tokens)
        self._routes.began(sequence, cached_tokens)
        self._hedges.answered(sequence, cached_tokens)

    def answered(self, sequence: CallSequence, link: WorkerLink) -> None:
        """Record a success of the worker: it has sent the first output of a sequence."""
        self._breakers.record_success(link.process)
        excluded = sequence.life.excluded
        if excluded and (failed := _processes(excluded, link)):
            workers = [other.process for other in self._links(link.identity.model)]
            self._breakers.record_proof(failed, sequence.call.id, workers, self._clock())

    def worker_failed(self, sequence: CallSequence, link: WorkerLink) -> None:
        """Record a failure of the worker: its engine could not continue a sequence."""
        earlier = _processes(sequence.life.excluded, link)
        others = (other.process for other in self._links(link.identity.model) if other is not link)
        self._breakers.record_failure(link.process, sequence.call.id, earlier, others, self._clock())

    def resumed(self, model: str, reason: str, gap_s: float) -> None:
        """Count a resume. `reason`: why the sequence was resumed. `gap_s`: seconds since the sequence's last token."""
        self._metrics.count("resumes_total", model, reason)
        self._metrics.histogram("resume_gap_seconds", model).observe(gap_s)

    def submission_refused(self, sequence: CallSequence) -> None:
        """Stop waiting for the usage report of a worker that has refused the sequence. The refused sequence costs
        nothing on that worker."""
        if (accounts := self._accounts()) is not None:
            accounts.refused(sequence)

    def finished(self, sequence: CallSequence) -> None:
        """Correct the service charge of a finished sequence to its actual cost. The correction does not wait for the
        end of the call, because other sequences of the call may run for a long time."""
        self._queues.settle(sequence)

    def hedge_ended(self, sequence: CallSequence, won: bool, computed_by: str) -> None:
        """Record that a sequence that was sent to two workers (hedged) stays on only one of them. `won`: True if it
        stays on the second worker, False for the first. `computed_by`: incarnation of the other worker, which may have
        computed the prompt in vain; "" if that worker has refused the sequence."""
        self._hedges.ended(sequence, won, computed_by)


def _processes(incarnations: Set[str], link: WorkerLink) -> frozenset[str]:
    """Return the names (WorkerLink.process) of the processes of the link's model with these incarnations, without that
    of the link."""
    own = link.identity
    return frozenset(f"{name}@{own.model}" for name in incarnations if name != own.incarnation)
