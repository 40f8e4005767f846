"""The scheduling policy of one gateway: which waiting sequence goes to which worker, and when a wait ends.

Problem: the order of the sequences, the choice of workers, the resume of sequences that lost a worker and the bounds of
all waits together decide what a tenant gets. These decisions must be testable without a network, and the simulator must
make the same decisions as a gateway.

Method: the policy keeps the queues and returns instructions. The caller carries out each instruction before it takes
the next one, because a sequence that is sent uses credit of its worker. Resumed sequences are sent before new
sequences, each to a compatible worker. The inputs are `now`, in monotonic seconds, and the state of `Workers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from cluster.api.types import CompatibilityKey
from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.fairness.waiting_room import RoomAdmission, WaitingRoom
from cluster.policy.routing.router import (
    Candidate,
    RouteCall,
    RoutingDecision,
    may_take_resumed,
    needs_parser,
    pick,
    uncached_tokens_at,
)
from cluster.policy.routing.version_split import ANY_VERSION, Versions
from cluster.policy.scheduling.instructions import Acquit, End, Ending, Fail, Instruction, ResumingSequence, Send
from cluster.policy.scheduling.resume_queue import ResumeQueue
from cluster.policy.scheduling.resume_route import resumed_request
from cluster.policy.scheduling.worker_losses import LossVerdict, WorkerLosses


class Workers(Protocol):
    """The workers that are linked to the gateway, as the policy sees them."""

    def candidates(self, model: str, now: float, resumed: bool) -> Sequence[Candidate]:
        """Return all workers of a model. `resumed`: whether the workers are for a sequence that resumes."""

    def candidate(self, model: str, incarnation: str, now: float) -> Candidate | None:
        """Return one worker of a model for a sequence that resumes, or None if the worker is not linked."""

    def cached_tokens(self, model: str, key: str) -> Mapping[str, int]:
        """Return how many leading tokens of a new sequence's prompt the workers of a model hold in their KV caches, by
        worker id. Workers that hold none are left out."""

    def is_replaced(self, model: str, compatibility: CompatibilityKey | None) -> bool:
        """Return whether incompatible workers have replaced all workers that could resume a sequence with this key."""


class SchedulingPolicy:
    """The scheduling policy of one gateway, for all models."""

    def __init__(
        self,
        room: WaitingRoom,
        workers: Workers,
        resume_wait_s: float,
        losses: WorkerLosses,
        pick_new: Callable[[RouteCall, Sequence[Candidate]], RoutingDecision] = pick,
    ) -> None:
        """`room`: queue of new sequences. `resume_wait_s`: longest wait of a sequence for a compatible worker.
        `pick_new`: picks the worker of a new sequence."""
        self.room = room
        self.resuming = ResumeQueue(resume_wait_s)
        self.losses = losses
        self._workers = workers
        self._pick_new = pick_new
        self._versions: dict[str, Versions] = {}
        """Versions on which the sequences in the waiting room may begin; without an entry, any version."""

    # ---- queues

    def admit(
        self, entry: WaitingSequence, now: float, starts_in_s: float = 0.0, versions: Versions = ANY_VERSION
    ) -> RoomAdmission:
        """Queue a new sequence if the waiting room admits the sequence; see WaitingRoom.admit. `versions`: versions of
        the model on which the sequence may begin."""
        admission = self.room.admit(entry, now, starts_in_s)
        for other in admission.shed:
            self._versions.pop(other.call_id, None)
        if admission.outcome is None:
            self.set_versions(entry.call_id, versions)
        return admission

    def put_back(self, entry: WaitingSequence, now: float, versions: Versions = ANY_VERSION) -> None:
        """Queue a sequence that starts over, at the head of its tenant's queue."""
        self.room.put_back(entry, now)
        self.set_versions(entry.call_id, versions)

    def set_versions(self, key: str, versions: Versions) -> None:
        """Set the versions on which a queued sequence may begin. Once a sequence of a call has begun, the other
        sequences of the call may begin only on its version."""
        if versions.all:
            self._versions[key] = versions
        else:
            self._versions.pop(key, None)

    def resume(self, sequence: ResumingSequence, now: float) -> None:
        """Queue a sequence to be resumed."""
        self.resuming.add(sequence, now)

    def remove(self, key: str) -> bool:
        """Remove a sequence from its queue. Returns False if the sequence was not queued."""
        self._versions.pop(key, None)
        return self.resuming.remove(key) or self.room.cancel(key)

    def waiting(self, model: str) -> tuple[int, int]:
        """Return the number of a model's waiting sequences, and the number of tokens to compute for these sequences."""
        (new, prompt_tokens), (resumed, tokens) = self.room.waiting(model), self.resuming.waiting(model)
        return new + resumed, prompt_tokens + tokens

    def expire(self, now: float, longer_s: Callable[[str], float]) -> list[End]:
        """Remove the sequences that have waited too long, and return the instructions to end their calls.
        `longer_s(model)`: see ResumeQueue.expired."""
        late = [entry.call_id for entry in self.room.pop_expired(now)]
        for key in late:
            self._versions.pop(key, None)
        ends = [End(key, Ending.TOO_LATE) for key in late]
        return ends + [End(key, Ending.NOT_RESUMED) for key in self.resuming.expired(now, longer_s)]

    # ---- new sequences

    def assign(self, model: str, now: float) -> Iterator[Instruction]:
        """Yield the instructions for all sequences of a model for which a worker has capacity."""
        yield from self.assign_resumed(model, self.resuming.in_order(model), now)
        yield from self.assign_new(model, now)

    def assign_new(self, model: str, now: float) -> Iterator[Instruction]:
        """Yield the instructions for new sequences, in the order of the waiting room. A head that fits on no worker
        holds back the sequences behind it."""
        decision: RoutingDecision | Exception | None = None

        def fits(entry: WaitingSequence) -> bool:
            nonlocal decision
            try:
                decision = self._route(entry, now)
            except Exception as error:
                decision = error
                return True
            return decision.worker_id is not None

        while (entry := self.room.pop_next(model, fits, now)) is not None:
            self._versions.pop(entry.call_id, None)
            if isinstance(decision, Exception):
                yield Fail(entry.call_id, decision)
            elif decision is not None and decision.worker_id is not None:
                yield Send(entry, decision.worker_id, decision.reason, cached_tokens=decision.cached_tokens)

    def _route(self, entry: WaitingSequence, now: float) -> RoutingDecision:
        """Pick a worker for a new sequence. Workers of the sequence's first version are tried first, then workers of
        all versions on which the sequence may begin."""
        keep_free, versions = self.room.slots_to_keep_free(entry), self._versions.get(entry.call_id, ANY_VERSION)
        candidates = self._workers.candidates(entry.model, now, resumed=False)
        first = frozenset((versions.first,)) if versions.first else versions.all
        cached = self._workers.cached_tokens(entry.model, entry.call_id)
        call = RouteCall(entry.model, entry.tokens, keep_free, versions=first, cached=cached)
        if needs_parser(entry.needs_tools, candidates):
            call = replace(call, needs_tools=True)
        decision = self._pick_new(call, candidates)
        if decision.worker_id is None and len(versions.all) > 1:
            decision = self._pick_new(replace(call, versions=versions.all), candidates)
        return decision

    # ---- resumed sequences

    def assign_resumed(self, model: str, sequences: Iterable[ResumingSequence], now: float) -> Iterator[Instruction]:
        """Yield the instructions for `sequences`, which wait in the resume queue of the model."""
        view = _WorkersView(self._workers, model, now)
        for sequence in sequences:
            if sequence.key not in self.resuming:  # an earlier instruction has ended its call
                continue
            try:
                yield from self._resume(sequence, view, now)
            except Exception as error:
                self.resuming.remove(sequence.key)
                yield Fail(sequence.key, error)

    def _resume(self, sequence: ResumingSequence, view: _WorkersView, now: float) -> Iterator[Instruction]:
        """Yield the instructions for one sequence; none if the sequence must wait."""
        candidates = self._offered(sequence, view, now)
        if any(map(may_take_resumed, candidates)):
            if sequence.suspect:
                verdict = self.losses.verdict(sequence.lost_links, sequence.lost_at, now)
                if verdict is LossVerdict.WAIT:
                    return
                if verdict is LossVerdict.END:
                    self.resuming.remove(sequence.key)
                    yield End(sequence.key, Ending.BLAMED)
                    return
                self.resuming.acquit(sequence.key)
                yield Acquit(sequence.key)
            request = resumed_request(sequence, candidates, now)
            decision = pick(request, candidates)
            if decision.worker_id is not None:
                self.resuming.remove(sequence.key)
                worker = next(one for one in candidates if one.worker_id == decision.worker_id)
                yield Send(sequence.entry, worker.worker_id, decision.reason, uncached_tokens_at(request, worker))
                view.refresh(worker)
                return
        if self._workers.is_replaced(sequence.model, sequence.compatibility):
            self.resuming.remove(sequence.key)
            yield End(sequence.key, Ending.REPLACED)

    def _offered(self, sequence: ResumingSequence, view: _WorkersView, now: float) -> Sequence[Candidate]:
        """Return the workers to choose from: for a short time only the worker that holds the KV blocks, then all."""
        cached_on = self.resuming.waits_for(sequence.key, now)
        if cached_on and cached_on not in sequence.excluded:
            holder = view.one(cached_on)
            if holder is not None and holder.healthy and not holder.draining:
                return (holder,)
        return view.all()

    def movable(self, sequences: Iterable[ResumingSequence], worker_id: str, now: float) -> Iterator[str]:
        """Yield the keys of the sequences for which another worker has capacity. `sequences` run on the draining worker
        `worker_id`. The caller must move each sequence before it takes the next key."""
        for sequence in sequences:
            candidates = self._workers.candidates(sequence.model, now, resumed=True)
            request = RouteCall(
                sequence.model,
                sequence.tokens,
                compatibility_key=sequence.compatibility,
                needs_tools=sequence.entry.needs_tools,
            )
            if pick(request, [one for one in candidates if one.worker_id != worker_id]).worker_id is not None:
                yield sequence.key

    def __repr__(self) -> str:
        return f"SchedulingPolicy({self.room}, {self.resuming})"


class _WorkersView:
    """Cache of one model's workers while a batch of sequences is assigned, since reading all workers for each sequence
    would be slow. After a sequence was sent, its worker is read again."""

    def __init__(self, workers: Workers, model: str, now: float) -> None:
        self._workers = workers
        self._model = model
        self._now = now
        self._all: list[Candidate] | None = None
        self._single: dict[str, Candidate | None] = {}

    def all(self) -> Sequence[Candidate]:
        """All workers of the model."""
        if self._all is None:
            self._all = list(self._workers.candidates(self._model, self._now, resumed=True))
        return self._all

    def one(self, incarnation: str) -> Candidate | None:
        """One worker of the model; None if the worker is not linked."""
        if incarnation not in self._single:
            self._single[incarnation] = self._workers.candidate(self._model, incarnation, self._now)
        return self._single[incarnation]

    def refresh(self, worker: Candidate) -> None:
        """Read a worker again after a sequence was sent to the worker."""
        self._single.pop(worker.incarnation, None)
        if self._all is not None:
            again = self._workers.candidate(self._model, worker.incarnation, self._now)
            self._all = [other for other in self._all if other.incarnation != worker.incarnation]
            if again is not None:
                self._all.append(again)
