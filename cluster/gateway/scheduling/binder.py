"""The binder, which sends waiting sequences to workers that have granted capacity.

The waiting room picks the next sequence. The router (policy/routing/router.py) picks a worker for the sequence. The
binder sends the sequence to the worker. Resumed sequences are sent before new sequences, each to a compatible worker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import structlog

from cluster.gateway.calls.call import CallSequence
from cluster.gateway.calls.sequence import OutputSequence
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.models import KnownModel
from cluster.gateway.scheduling import queue_errors
from cluster.gateway.scheduling.candidates import candidate, resumed_request
from cluster.gateway.scheduling.queues import Queues
from cluster.gateway.scheduling.service_charges import ServiceCharges
from cluster.gateway.scheduling.submission import submit
from cluster.gateway.scheduling.worker_losses import LossVerdict, WorkerLosses
from cluster.observe.metrics import Metrics
from cluster.policy.fairness.waiting_room import WaitingSequence
from cluster.policy.routing.breaker import Breakers
from cluster.policy.routing.router import (
    Candidate,
    RouteCall,
    RoutingDecision,
    may_take_resumed,
    pick,
    uncached_tokens_at,
)

if TYPE_CHECKING:
    from cluster.gateway.usage.accounting import Accounting

log = structlog.get_logger("dispatch")


class Binder:
    """The binder of one gateway, for all models."""

    def __init__(
        self,
        queues: Queues,
        charges: ServiceCharges,
        losses: WorkerLosses,
        metrics: Metrics,
        accounting: Callable[[], Accounting | None],
        clock: Callable[[], float],
    ) -> None:
        """`accounting` returns the gateway's accounts, or None if the gateway keeps no accounts."""
        self.breakers = Breakers()
        self._queues = queues
        self._charges = charges
        self._losses = losses
        self._metrics = metrics
        self._accounting = accounting
        self._clock = clock

    # ---- new sequences

    def send_queued(self, model: KnownModel) -> None:
        """Send queued sequences of a model as long as a worker has capacity."""
        now = self._clock()
        while (routed := self._next(model, now)) is not None:
            waiting, decision = routed
            sequence = self._queues.pop(waiting.call_id)
            if sequence is None:
                continue
            if isinstance(decision, Exception):
                sequence.call.fail_unexpectedly(decision)
            elif decision.worker_id is not None:
                self._bind(model.links[decision.worker_id], sequence, decision, waiting)

    def _next(self, model: KnownModel, now: float) -> tuple[WaitingSequence, RoutingDecision | Exception] | None:
        """Pop the next sequence from the waiting room, if a worker has capacity for the sequence or if routing the
        sequence raised an exception. Returns the sequence and the routing decision or the exception."""
        decision: RoutingDecision | Exception | None = None

        def fits(sequence: CallSequence, waiting: WaitingSequence) -> bool:
            nonlocal decision
            try:
                decision = self._route(model, sequence, waiting, now)
            except Exception as error:
                decision = error
                return True
            return decision.worker_id is not None

        waiting = self._queues.next(model.name, fits, now)
        return None if waiting is None or decision is None else (waiting, decision)

    def _route(
        self, model: KnownModel, sequence: CallSequence, waiting: WaitingSequence, now: float
    ) -> RoutingDecision:
        """Pick the worker for the next sequence: a worker of the call's first version, else a worker of any version
        that the call may use."""
        keep_free = self._charges.fair.order(model.name).slots_to_keep_free(waiting)
        versions = sequence.call.versions
        candidates = self.candidates(model, now)
        first = frozenset((versions.first,)) if versions.first else versions.all
        decision = pick(RouteCall(model.name, waiting.tokens, keep_free, versions=first), candidates)
        if decision.worker_id is None and len(versions.all) > 1:
            decision = pick(RouteCall(model.name, waiting.tokens, keep_free, versions=versions.all), candidates)
        return decision

    # ---- resumed sequences

    def send_resumed(self, model: KnownModel, sequences: Sequence[CallSequence]) -> None:
        """Resume `sequences`, each on a compatible worker with capacity."""
        if not sequences:
            return
        now = self._clock()
        seen: dict[str, Candidate] = {}

        def candidate_of(link: WorkerLink) -> Candidate:
            known = seen.get(link.identity.worker_id)
            if known is None:
                known = seen[link.identity.worker_id] = self._candidate(model, link, now, resumed=True)
            return known

        for sequence in sequences:
            if sequence.call.error is not None:  # the call's API is about to end the call
                continue
            try:
                worker_id = self._resume(model, sequence, candidate_of, now)
            except Exception as error:
                self._queues.stop_resuming(sequence)
                sequence.call.fail_unexpectedly(error)
                continue
            if worker_id is not None:
                seen.pop(worker_id)

    def _resume(
        self, model: KnownModel, sequence: CallSequence, candidate_of: Callable[[WorkerLink], Candidate], now: float
    ) -> str | None:
        """Send a sequence to a compatible worker. Returns the worker's id; None if no compatible worker has
        capacity."""
        cached_on = self._queues.resumed.waits_for(sequence, now)
        cached = next((link for link in model.links.values() if link.identity.incarnation == cached_on), None)
        candidates = [candidate_of(cached)] if cached is not None and cached_on not in sequence.excluded else []
        if not candidates or not candidates[0].healthy or candidates[0].draining:
            candidates = [candidate_of(link) for link in model.links.values()]
        if any(map(may_take_resumed, candidates)):
            if sequence.suspect and not self._acquitted(sequence, now):
                return None
            waiting = self._charges.waiting(sequence)
            request = resumed_request(sequence, candidates, model, waiting.cached_tokens, now)
            decision = pick(request, candidates)
            if decision.worker_id is not None and self._queues.stop_resuming(sequence):
                link = model.links[decision.worker_id]
                self._bind(link, sequence, decision, waiting, uncached_tokens_at(request, candidate_of(link)))
                return decision.worker_id
        if model.is_replaced(sequence.compatibility):
            self._queues.stop_resuming(sequence)
            sequence.call.fail(queue_errors.replaced(len(sequence.emitted)))
        return None

    def _acquitted(self, sequence: CallSequence, now: float) -> bool:
        """Return whether a sequence that lost several workers in a row may be sent to another worker now. The call is
        ended if the verdict is that the sequence must not be sent again."""
        verdict = self._losses.verdict(sequence.lost_links, sequence.lost_at, now)
        if verdict is LossVerdict.RESUME:
            sequence.acquit()
        elif verdict is LossVerdict.END:
            log.warning("call_blamed", request_id=sequence.call.request_id, lost=sequence.lost_links)
            self._queues.stop_resuming(sequence)
            sequence.call.blame(queue_errors.blamed(len(sequence.emitted), len(sequence.lost_links)))
        return verdict is LossVerdict.RESUME

    def move(self, link: WorkerLink, model: KnownModel) -> None:
        """Move sequences from a draining worker to other workers, as many as the other workers have capacity for now.
        The remaining sequences are moved by later calls."""
        for sequence in [sink for sink in link.sinks if isinstance(sink, OutputSequence)]:
            candidates = [
                other
                for other in self.candidates(model, self._clock(), resumed=True)
                if other.worker_id != link.identity.worker_id
            ]
            request = RouteCall(model.name, sequence.tokens, compatibility_key=sequence.compatibility)
            if pick(request, candidates).worker_id is None:
                continue
            try:
                sequence.move()
            except Exception as error:
                sequence.call.fail_unexpectedly(error)

    # ---- new and resumed sequences

    def _bind(
        self,
        link: WorkerLink,
        sequence: CallSequence,
        decision: RoutingDecision,
        waiting: WaitingSequence,
        fresh_tokens: int = 0,
    ) -> None:
        now = self._clock()
        if submit(sequence, link, waiting, self._accounting(), now, fresh_tokens):
            self.breakers.record_sent(link.identity.incarnation, now)
            self._metrics.count("route_decisions_total", sequence.call.model, decision.reason)

    def candidates(self, model: KnownModel, now: float, resumed: bool = False) -> list[Candidate]:
        """Return the workers of a model as candidates for the router. `resumed`: whether a sequence is to be
        resumed."""
        return [self._candidate(model, link, now, resumed) for link in model.links.values()]

    def _candidate(self, model: KnownModel, link: WorkerLink, now: float, resumed: bool) -> Candidate:
        healthy = self.breakers.allows(link.identity.incarnation, now)
        return candidate(link, healthy=healthy, resumed=resumed, retired=model.retired(link))
