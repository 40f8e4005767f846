"""Waiting and binding: sequences wait in tenancy's room and leave it when routing finds a worker that has granted room.

Nothing is decided here. The waiting room says who is next, by the tenants' turns, routing says where to; this module
acts on it and hears the link's news.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from cluster.api.demand import ModelDemand
from cluster.api.types import CatalogEntry, WorkerIdentity
from cluster.gateway.calls.call import Call, CallSequence
from cluster.gateway.calls.life import WAITING, State
from cluster.gateway.calls.sequence import OutputSequence
from cluster.gateway.demand import DemandTally
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.models import KnownModel, ModelDirectory
from cluster.gateway.scheduling import queue_errors
from cluster.gateway.scheduling.canary_statistics import CanaryStatistics
from cluster.gateway.scheduling.candidates import candidate, onward_call
from cluster.gateway.scheduling.peer_backlog import BacklogReports
from cluster.gateway.scheduling.resume_queue import ResumeQueue
from cluster.gateway.scheduling.service_charges import ServiceCharges
from cluster.gateway.scheduling.submission import submit
from cluster.gateway.scheduling.worker_losses import MOST_SILENT, LossVerdict, WorkerLosses
from cluster.observe.metrics import Metrics
from cluster.policy.fairness.peer_backlog import ServedTotal
from cluster.policy.fairness.waiting_room import Waiting, WaitingRoom
from cluster.policy.routing.breaker import Breakers
from cluster.policy.routing.router import Candidate, RouteCall, RoutingDecision, fresh_at, pick, takes_onward
from cluster.policy.routing.version_split import Versions
from cluster.wire.fairness_codec import WeightedValue

if TYPE_CHECKING:
    from cluster.gateway.usage.accounting import Accounting

log = structlog.get_logger("dispatch")

SWEEP_S = 1.0
STANDS_STILL = ("silent", "hung", "deaf", "mute")
"""Ways of a link's end after which its worker, should it dial anew, has to show that it serves."""
UNSEEN = ("silent", "hung")
"""Those of them in which its engine's steps can show it."""


class Scheduler:
    """Implements the hub's listener."""

    def __init__(
        self,
        room: WaitingRoom,
        turns: ServiceCharges,
        metrics: Metrics,
        directory: Callable[[], ModelDirectory],
        clock: Callable[[], float] = time.monotonic,
        resume_wait_s: float = 30.0,
        max_silent_losses: int = MOST_SILENT,
    ) -> None:
        """`room` takes its orders from `turns`. `resume_wait_s`: how long a sequence that has lost its worker waits for
        another like it. `max_silent_losses`: see worker_losses.py."""
        self._room = room
        self.turns = turns
        self._metrics = metrics
        self._directory = directory
        self._clock = clock
        self._queued: dict[str, CallSequence] = {}
        self._arrived: Counter[str] = Counter()
        self._arrived_tokens: Counter[str] = Counter()
        self.tally = DemandTally()
        self.on_held: Callable[[], None] = lambda: None
        """Told when a call waits for a model that nobody serves, the first of them: somebody may have to start it."""
        self._told_held: set[str] = set()
        self._returning = ResumeQueue(resume_wait_s)
        self._losses = WorkerLosses(max_silent_losses)
        self.breakers = Breakers()
        self.trials = CanaryStatistics()
        self.backlogs = BacklogReports(turns, self.waiting, self._returning, self._links, clock)
        self._swept = clock()
        self.on_state: Callable[[], None] = lambda: None
        self.taken_over: Callable[[str], Sequence[tuple[str, int]]] = lambda model: ()
        """Calls of a model that were resumed here, with their generations: told to each worker that comes."""
        self.accounting: Accounting | None = None
        """Set before the first call, where accounts are kept."""

    # ---- calls

    def enter(self, call: Call, model: KnownModel) -> None:
        """Queue every sequence of a call, and send what has room at once. Raises CallError; then nothing is queued."""
        no_hope = queue_errors.hopeless(model)
        if no_hope is not None:
            raise no_hope
        starts_in_s = 0.0 if call.deadline is None else self.turns.starts_in_s(call)
        onward = []
        for sequence in call.sequences:
            if sequence.finish_reason:
                continue
            if sequence.emitted:  # at another gateway, where it had its turn
                self._return(sequence)
                onward.append(sequence)
                continue
            self._arrived[model.name] += 1
            self._arrived_tokens[model.name] += len(sequence.request.prompt_token_ids)
            waiting = self.turns.waiting(sequence)
            self.tally.arrived(waiting)
            admission = self._room.admit(waiting, self._clock(), starts_in_s)
            self._fail_shed(admission.shed)
            if admission.outcome is not None:
                self.leave(call)
                raise queue_errors.not_let_in(admission.outcome)
            self._queued[sequence.key] = sequence
            self.tally.waits(waiting)
        if len(onward) < len(call.sequences):
            self._pump(model.name)
        else:
            self._go_on(model, onward)
        self._hold(model)

    def missed(self, call: Call, model: KnownModel) -> None:
        """Another model stands in for one that nobody serves: that is demand for it all the same."""
        self._arrived[model.name] += len(call.sequences)
        self._arrived_tokens[model.name] += sum(len(one.request.prompt_token_ids) for one in call.sequences)
        self._hold(model)

    def _hold(self, model: KnownModel) -> None:
        """What waits for a model that nobody serves is demand now, not at the next report."""
        if model.name not in self._told_held and not model.served:
            self._told_held.add(model.name)
            self.on_held()

    def _fail_shed(self, shed: Sequence[Waiting]) -> None:
        for waiting in shed:
            sequence = self._take(waiting.call_id)
            if sequence is not None:
                sequence.call.fail(queue_errors.shed())

    def leave(self, call: Call) -> None:
        """A call is over, however it ended: nothing of it waits or runs any longer."""
        waited = False
        for sequence in call.sequences:
            waited |= self._returning.take(sequence)
            if self._take(sequence.key) is not None:
                waited |= self._room.leave(sequence.key)
        call.release()
        for sequence in call.sequences:
            try:
                self._over(sequence)
            except Exception:  # the others' accounts are to be settled all the same
                log.exception("sequence_not_settled", request_id=call.request_id)
            self.turns.forget(sequence)
        if waited:
            self.backlogs.changed(call.model)

    def requeue(self, sequence: CallSequence) -> None:
        """Queue a sequence that has left its worker: one to resume before all others, one to retry at the head of its
        tenant's queue."""
        if sequence.state not in WAITING:  # its call has ended meanwhile
            return
        known = self._directory().find(sequence.call.model)
        if sequence.state is State.RESUMING:
            self._return(sequence)
            if known is not None:
                self._go_on(known, (sequence,))
        else:
            waiting = self.turns.waiting(sequence)
            self._queued[sequence.key] = sequence
            self._choose_anew(sequence.call)
            self._room.put_back(waiting, self._clock())
            self.tally.waits(waiting)
            self._pump(sequence.call.model)
        if known is not None:
            self._hold(known)

    def _return(self, sequence: CallSequence) -> None:
        """It waits to go on, from now on and not since it came, and is demand like all that waits: a model that nobody
        serves is started for it, too."""
        now = self._clock()
        self._returning.add(sequence, now, sequence.silent_since)
        self.tally.waits(replace(self.turns.waiting(sequence), arrived=now))

    def _choose_anew(self, call: Call) -> None:
        """A call of which nothing has been told may begin at any version that reads its prompt alike: its own may have
        lost its last worker."""
        known = self._directory().find(call.model)
        if known is None or not call.versions.all or any(one.emitted or one.link for one in call.sequences):
            return
        links = [link for link in known.links.values() if known.takes(link)]
        alike = frozenset(one.identity.version for one in links if one.identity.bundle_digest == call.bundle_digest)
        if alike:
            call.choose(Versions(call.versions.first if call.versions.first in alike else "", alike))

    def _take(self, waiting_id: str) -> CallSequence | None:
        """It waits no more; None when it did not."""
        self.tally.waits_no_more(waiting_id)
        return self._queued.pop(waiting_id, None)

    def cut(self, call: Call) -> None:
        """End a call with what it has; what waits of it still gets nothing."""
        for sequence in call.sequences:
            self._returning.take(sequence)
            if self._take(sequence.key) is not None:
                self._room.leave(sequence.key)
            sequence.cut()
        call.wake()

    def grew(self, call: Call) -> None:
        """A few times a second for each running call: its tenant's account follows it, and so does the demand."""
        for sequence in call.sequences:
            if sequence.finish_reason:
                self._over(sequence)
            elif sequence.emitted:
                if (place := self.turns.place(sequence)) is not None:
                    self.tally.grew(place, len(sequence.emitted))
                self.turns.grew(sequence)

    def _over(self, sequence: CallSequence) -> None:
        if (place := self.turns.place(sequence)) is not None:
            self.tally.ended(place, len(sequence.emitted), sequence.computed)
        self.turns.settle(sequence)

    def position(self, call: Call) -> int:
        """The place of the call's first waiting sequence in its tenant's line, 1 the next; 0 when none of it waits."""
        positions = [self._room.position(o.key) for o in call.sequences if o.key in self._queued]
        return min((p + 1 for p in positions if p is not None), default=0)

    # ---- binding

    def _pump(self, model: str) -> None:
        """Send waiting sequences of a model while somebody has room."""
        known = self._directory().find(model)
        if known is None:
            return
        now = self._clock()
        self._send_returning(known, self._returning.of(model))
        while (found := self._next(known, now)) is not None:
            waiting, decision = found
            sequence = self._take(waiting.call_id)
            if sequence is None:
                continue
            if isinstance(decision, Exception):
                sequence.call.fail_unexpectedly(decision)
            elif decision.worker_id is not None:
                self._bind(known.links[decision.worker_id], sequence, decision, waiting)
        self.backlogs.changed(model)

    def _next(self, known: KnownModel, now: float) -> tuple[Waiting, RoutingDecision | Exception] | None:
        """Take whose turn it is out of the room, if a worker has room for it, or if its routing has failed."""
        decision: RoutingDecision | Exception | None = None

        def fits(waiting: Waiting) -> bool:
            nonlocal decision
            try:
                decision = self._route(known, waiting, now)
            except Exception as error:
                decision = error
                return True
            return decision.worker_id is not None

        waiting = self._room.next(known.name, fits, now)
        return None if waiting is None or decision is None else (waiting, decision)

    def _route(self, known: KnownModel, waiting: Waiting, now: float) -> RoutingDecision:
        """The worker for a sequence whose turn it is."""
        keep_free = self.turns.fair.order(known.name).keep_free(waiting)
        versions = self._queued[waiting.call_id].call.versions
        candidates = self._candidates(known, now)
        first = frozenset((versions.first,)) if versions.first else versions.all
        decision = pick(RouteCall(known.name, waiting.tokens, keep_free, versions=first), candidates)
        if decision.worker_id is None and len(versions.all) > 1:
            decision = pick(RouteCall(known.name, waiting.tokens, keep_free, versions=versions.all), candidates)
        return decision

    def _go_on(self, known: KnownModel, sequences: Sequence[CallSequence]) -> None:
        """These have come to go on. Nothing else has changed, so that nobody else is to be looked at: where a gateway
        or a worker was lost they are many, and those before them were looked at when they came."""
        self._send_returning(known, sequences)
        self.backlogs.changed(known.name)

    def _send_returning(self, known: KnownModel, sequences: Sequence[CallSequence]) -> None:
        """Let those go on that have lost their worker, each at one like it."""
        if not sequences:
            return
        now = self._clock()
        seen: dict[str, Candidate] = {}

        def look(link: WorkerLink) -> Candidate:
            found = seen.get(link.identity.worker_id)
            if found is None:
                found = seen[link.identity.worker_id] = self._candidate(known, link, now, onward=True)
            return found

        for sequence in sequences:
            if sequence.call.error is not None:  # its face is about to end it
                continue
            try:
                bound_to = self._send_onward(known, sequence, look, now)
            except Exception as error:
                self._stop_waiting(sequence)
                sequence.call.fail_unexpectedly(error)
                continue
            if bound_to is not None:
                seen.pop(bound_to)

    def _send_onward(
        self, known: KnownModel, sequence: CallSequence, look: Callable[[WorkerLink], Candidate], now: float
    ) -> str | None:
        """The worker that a resumed sequence was sent to; None where none has room for it."""
        home = self._returning.home(sequence, now)
        own = next((one for one in known.links.values() if one.identity.incarnation == home), None)
        candidates = [look(own)] if own is not None and home not in sequence.excluded else []
        if not candidates or not candidates[0].healthy or candidates[0].draining:
            candidates = [look(link) for link in known.links.values()]
        worker_id = None
        if any(map(takes_onward, candidates)):
            if sequence.suspect and not self._acquitted(sequence, now):
                return None
            waiting = self.turns.waiting(sequence)
            call = onward_call(sequence, candidates, known, waiting.cached_tokens, now)
            decision = pick(call, candidates)
            worker_id = decision.worker_id
        if worker_id is not None and self._stop_waiting(sequence):
            link = known.links[worker_id]
            self._bind(link, sequence, decision, waiting, fresh_at(call, look(link)))
            return worker_id
        if known.comes_no_more(sequence.compatibility):
            self._stop_waiting(sequence)
            sequence.call.fail(queue_errors.replaced(len(sequence.emitted)))
        return None

    def _acquitted(self, sequence: CallSequence, now: float) -> bool:
        """Whether a sequence that lost worker after worker may go to another; ends its call if it may not."""
        verdict = self._losses.verdict(sequence.lost_links, sequence.lost_at, now)
        if verdict is LossVerdict.RESUME:
            sequence.acquit()
        elif verdict is LossVerdict.END:
            log.warning("call_blamed", request_id=sequence.call.request_id, lost=sequence.lost_links)
            self._stop_waiting(sequence)
            sequence.call.blame(queue_errors.blamed(len(sequence.emitted), len(sequence.lost_links)))
        return verdict is LossVerdict.RESUME

    def _stop_waiting(self, sequence: CallSequence) -> bool:
        """Take a resumed sequence out of its line; False when it did not wait there."""
        waited = self._returning.take(sequence)
        if waited:
            self.tally.waits_no_more(sequence.key)
        return waited

    def _bind(
        self,
        link: WorkerLink,
        sequence: CallSequence,
        decision: RoutingDecision,
        waiting: Waiting,
        fresh_tokens: int = 0,
    ) -> None:
        now = self._clock()
        if submit(sequence, link, waiting, self.accounting, now, fresh_tokens):
            self.breakers.sent(link.identity.incarnation, now)
            self._metrics.count("route_decisions_total", sequence.call.model, decision.reason)

    def _candidates(self, known: KnownModel, now: float, onward: bool = False) -> list[Candidate]:
        """`onward`: for a call that goes on."""
        return [self._candidate(known, link, now, onward) for link in known.links.values()]

    def _candidate(self, known: KnownModel, link: WorkerLink, now: float, onward: bool) -> Candidate:
        healthy = self.breakers.lets(link.identity.incarnation, now)
        return candidate(link, healthy=healthy, onward=onward, retired=known.retired(link))

    def began(self, sequence: CallSequence, cached_tokens: int) -> None:
        """A sequence's first output has come."""
        self.turns.began(sequence, cached_tokens)

    def answered(self, link: WorkerLink) -> None:
        """A worker has sent the first output of a sequence."""
        self.breakers.answered(link.identity.incarnation)

    def worker_failed(self, link: WorkerLink) -> None:
        """A worker's engine could not continue a sequence."""
        others = (one.identity.incarnation for one in self._links(link.identity.model) if one is not link)
        self.breakers.failed(link.identity.incarnation, others, self._clock())

    def not_taken(self, sequence: CallSequence) -> None:
        """A worker has refused a sequence: that has cost nothing."""
        if self.accounting is not None:
            self.accounting.refused(sequence)

    def _begun(self, model: str, continued: bool) -> None:
        """A step has begun with what had been sent for it, so that others may follow in the next: those that go on, and
        those that begin, where they were held back for them."""
        if continued or self._returning.waiting(model)[0]:
            self._pump(model)

    def resumed(self, model: str, reason: str, gap_s: float) -> None:
        """A sequence has gone on at another worker, and its caller has waited so long for its next token."""
        self._metrics.count("resumes_total", model, reason)
        self._metrics.histogram("resume_gap_seconds", model).observe(gap_s)

    def take_over(self, call: Call, generation: int) -> None:
        """A call was resumed here: no worker is to run it for readers before."""
        for link in self._links(call.model):
            link.box.takeover(call.shown_id, generation)

    def _links(self, model: str) -> Sequence[WorkerLink]:
        known = self._directory().find(model)
        return [] if known is None else [known.links[worker] for worker in sorted(known.links)]

    # ---- time

    def expire(self) -> None:
        """End what has waited too long; called a few times a second."""
        now = self._clock()
        if now - self._swept >= SWEEP_S:
            self._swept = now
            self._sweep(now)
        for waiting in self._room.expired(now):
            sequence = self._take(waiting.call_id)
            if sequence is not None:
                call = sequence.call
                call.fail(queue_errors.too_late(call.model, self._directory().find(call.model), self._late(call)))
        for sequence in self._returning.expired(now, self._directory().starts_in_s):
            self.tally.waits_no_more(sequence.key)
            sequence.call.fail(queue_errors.not_resumed(len(sequence.emitted), self._late(sequence.call)))
        for name in self._returning.models:  # somebody may have waited for its own worker's room long enough
            self._pump(name)
        if self.breakers.open:  # a pause may be over
            for model in self._directory().models:
                for link in model.links.values():
                    self.breakers.stepped(link.identity.incarnation, now, link.load.steps)
                self._pump(model.name)

    def _sweep(self, now: float) -> None:
        models = self._directory().models
        self.tally.keep(model.name for model in models)
        self._told_held &= {model.name for model in models if not model.served}
        self.turns.sweep({model.name: bool(model.links) for model in models}, now)
        self.breakers.forget(link.identity.incarnation for model in models for link in model.links.values())
        for model in models:
            for link in list(model.links.values()):
                if now >= link.leave_at or model.quarantined(link):
                    self._move(link, model)

    def _move(self, link: WorkerLink, model: KnownModel) -> None:
        """A worker is about to leave: let go on elsewhere what can, a few at a time, the rest as places come free."""
        for sequence in [one for one in link.sinks if isinstance(one, OutputSequence)]:
            candidates = [
                one
                for one in self._candidates(model, self._clock(), onward=True)
                if one.worker_id != link.identity.worker_id
            ]
            if (
                pick(RouteCall(model.name, sequence.tokens, likeness=sequence.compatibility), candidates).worker_id
                is None
            ):
                continue
            try:
                sequence.move()
            except Exception as error:
                sequence.call.fail_unexpectedly(error)

    def _late(self, call: Call) -> bool:
        return call.deadline is not None and self._clock() >= call.deadline

    # ---- HubListener

    def joined(self, link: WorkerLink) -> None:
        """A worker's link is up."""
        link.on_served = self._served
        link.on_elsewhere = lambda gateway, waiting: self.turns.waiting_elsewhere(
            link.identity.model, gateway, waiting, self._clock()
        )
        link.on_standing = lambda: self.on_state()
        link.on_begun = lambda continued: self._begun(link.identity.model, continued)
        for call_id, generation in self.taken_over(link.identity.model):
            link.box.takeover(call_id, generation)
        self.turns.joined(link.identity)
        self._losses.returned(link.identity.incarnation)
        link.on_gaps = self._metrics.histogram("inter_token_latency_seconds", link.identity.model).observe
        self._directory().joined(link)
        self.backlogs.joined(link.identity.model)
        self._pump(link.identity.model)
        self.on_state()

    def left(self, link: WorkerLink, why: str) -> None:
        """A worker's link has ended; its sequences have been told already."""
        self._directory().left(link)
        self.turns.left(link.identity, self._clock())
        self._metrics.count("worker_detected_total", link.identity.model, link.reason)
        if not link.leaving:
            out_of_reach = "" if link.reason == "hung" else link.identity.incarnation
            self._losses.lost(link.name, self._clock(), out_of_reach)
        if link.reason in STANDS_STILL:
            unseen = link.reason in UNSEEN
            self.breakers.stood_still(link.identity.incarnation, self._clock(), unseen)
        self._pump(link.identity.model)
        self.on_state()

    def _served(self, link: WorkerLink, totals: Sequence[WeightedValue[ServedTotal]]) -> None:
        self.turns.served(link.identity, totals, self._clock())

    def changed(self, link: WorkerLink) -> None:
        """Credit or standing changed."""
        self._pump(link.identity.model)

    def catalog(self, entries: Sequence[CatalogEntry]) -> None:
        """A new catalog."""
        self._directory().catalog(entries)
        self.trials.catalog(entries)
        for model in self._directory().models:  # workers may take calls again that were set apart
            self._pump(model.name)
        self._fail_hopeless()
        self.on_state()

    def _fail_hopeless(self) -> None:
        """Calls that wait for a model which has failed meanwhile are told so now, not at their deadline."""
        for sequence in list(self._queued.values()):
            known = self._directory().find(sequence.call.model)
            no_hope = None if known is None else queue_errors.hopeless(known)
            if no_hope is not None:
                sequence.call.fail(no_hope)

    def refuses(self, identity: WorkerIdentity) -> str:
        """Why a worker may not serve its model; empty when it may."""
        return self._directory().refuses(identity)

    def demand(self) -> Sequence[ModelDemand]:
        """What the controller should know."""
        out = []
        for model in self._directory().models:
            count, tokens = self.waiting(model.name)
            running = sum(link.running for link in model.links.values())
            out.append(
                ModelDemand(
                    model.name,
                    count,
                    tokens,
                    running,
                    self._arrived[model.name],
                    self._arrived_tokens[model.name],
                    self.tally.classes(model.name, self._clock(), model.served),
                )
            )
        return out

    def waiting(self, model: str) -> tuple[int, int]:
        """Sequences and prompt tokens of a model that wait here."""
        (begins, prompt_tokens), (returns, tokens) = self._room.waiting(model), self._returning.waiting(model)
        return begins + returns, prompt_tokens + tokens

    def returning(self, call: Call) -> bool:
        """Whether some of a call waits to go on at another worker."""
        return any(sequence in self._returning for sequence in call.sequences)
