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
from cluster.policy.routing.rendezvous import hash64
from cluster.policy.routing.router import (
    Candidate,
    FullHolder,
    RouteCall,
    RoutingDecision,
    may_take_resumed,
    pick,
    uncached_tokens_at,
)
from cluster.policy.routing.version_split import ANY_VERSION, Versions
from cluster.policy.scheduling.adapter_waits import AdapterWaits
from cluster.policy.scheduling.instructions import Acquit, End, Ending, Fail, Instruction, ResumingSequence, Send
from cluster.policy.scheduling.resume_queue import ResumeQueue
from cluster.policy.scheduling.resume_route import resumed_request, suits
from cluster.policy.scheduling.set_aside import Aside, SetAside
from cluster.policy.scheduling.warm_sequences import WarmSequences
from cluster.policy.scheduling.worker_losses import LossVerdict, WorkerLosses

FEW = 32
"""If a model has at most this many workers, a sequence that resumes may go to any of them."""
LOOKED_AT, CHOICES = 64, 8
"""If a model has more workers: the number of workers that are looked at, and the largest number of suitable ones among
which the router chooses."""


class Workers(Protocol):
    """The workers that are linked to the gateway, as the policy sees them."""

    def route(self, call: RouteCall, now: float) -> RoutingDecision:
        """Pick a worker for a new sequence, see policy/routing/fleet.py."""

    def candidates(self, model: str, now: float, resumed: bool) -> Sequence[Candidate]:
        """Return all workers of a model. `resumed`: whether the workers are for a sequence that resumes. The state of a
        worker may be read only when the caller looks at the worker."""

    def candidate(self, model: str, incarnation: str, now: float) -> Candidate | None:
        """Return one worker of a model for a sequence that resumes, or None if the worker is not linked."""

    def cached_tokens(self, model: str, key: str) -> Mapping[str, int] | None:
        """Return how many leading tokens of a new sequence's prompt the workers of a model hold in their KV caches, by
        worker id. Workers that hold none are left out. None if this is not known or makes no difference."""

    def held_tokens(self, model: str, key: str) -> Mapping[str, int]:
        """Return the same numbers as `cached_tokens`, also if there is only one worker to choose from."""

    def free_tokens(self, model: str, worker_id: str) -> int | None:
        """Return the number of tokens of the largest prompt that a worker can take now; 0 if it can take no sequence
        now, None if the worker is not linked or takes no new sequences."""

    def has_adapter(self, model: str, adapter: str) -> bool:
        """Return whether any worker of a model takes calls for an adapter, see RouteCall. The call is cheap."""

    def runs_suspect(self, model: str, incarnation: str) -> bool:
        """Return whether a worker runs a suspect sequence that has got no token there yet, see worker_losses.py."""

    def is_replaced(self, model: str, compatibility: CompatibilityKey | None) -> bool:
        """Return whether incompatible workers have replaced all workers that could resume a sequence with this key."""


class SchedulingPolicy:
    """The scheduling policy of one gateway, for all models."""

    def __init__(self, room: WaitingRoom, workers: Workers, resume_wait_s: float, losses: WorkerLosses) -> None:
        """`room`: queue of new sequences. `resume_wait_s`: longest wait of a sequence for a compatible worker."""
        self.room = room
        self.resuming = ResumeQueue(resume_wait_s)
        self.losses = losses
        self._workers = workers
        self._warm = WarmSequences(workers)
        self.aside = SetAside()
        self.adapter_waits = AdapterWaits()
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
        self._return_to_room(key)
        if versions.all:
            self._versions[key] = versions
        else:
            self._versions.pop(key, None)

    def resume(self, sequence: ResumingSequence, now: float) -> None:
        """Queue a sequence to be resumed."""
        if sequence.suspect:
            self.losses.suspect(sequence.key, sequence.lost_links, now)
        self.resuming.add(sequence, now)

    def remove(self, key: str) -> bool:
        """Remove a sequence from its queue. Returns False if the sequence was not queued."""
        self._versions.pop(key, None)
        self._return_to_room(key)  # so that its charge is given back
        return self.resuming.remove(key) or self.room.cancel(key)

    def _return_to_room(self, key: str) -> None:
        """Put a sequence back into the waiting room if it has had its turn and was not sent."""
        if (turn := self.aside.pop(key) or self.adapter_waits.pop(key)) is not None:
            self.room.put_back(turn.entry, turn.since)

    def position(self, key: str) -> int | None:
        """Return the number of the tenant's new sequences ahead of a queued new sequence; None if it is not queued."""
        return 0 if key in self.aside or key in self.adapter_waits else self.room.position(key)

    def waiting(self, model: str) -> tuple[int, int]:
        """Return the number of a model's waiting sequences, and the number of tokens to compute for these sequences."""
        sequences, tokens = self.room.waiting(model)
        for queue in (self.resuming, self.aside, self.adapter_waits):
            if queue:
                more_sequences, more_tokens = queue.waiting(model)
                sequences, tokens = sequences + more_sequences, tokens + more_tokens
        return sequences, tokens

    def expire(self, now: float, longer_s: Callable[[str], float]) -> list[End]:
        """Remove the sequences that have waited too long, and return the instructions to end their calls.
        `longer_s(model)`: see ResumeQueue.expired."""
        late = [entry.call_id for entry in self.room.pop_expired(now)]
        for wait in self.adapter_waits.expired(now):
            self.remove(wait.entry.call_id)
            late.append(wait.entry.call_id)
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
        """Yield the instructions for new sequences: those that were set aside, those that wait for adapters, then the
        others in the order of the waiting room. A sequence at the head that fits on no worker holds back those behind
        it."""
        for aside in self.aside.in_order(model):
            yield from self._assign_aside(aside, now)
        yield from self._assign_with_adapters(model, now)
        decision: RoutingDecision | Exception | None = None
        cached: Mapping[str, int] | None = None
        call: RouteCall | None = None
        lacks_adapter = False

        def fits(entry: WaitingSequence) -> bool:
            nonlocal decision, cached, call, lacks_adapter
            lacks_adapter = False
            try:
                cached = self._workers.cached_tokens(entry.model, entry.call_id)
                call = self._call(entry, cached or {})
                decision = self._route(call, entry, now)
                if decision.worker_id is None and call.adapter:
                    lacks_adapter = self._route(replace(call, adapter=""), entry, now).worker_id is not None
            except Exception as error:
                decision = error
                return True
            return decision.worker_id is not None or lacks_adapter

        while (entry := self.room.pop_next(model, fits, now, self._warm.loss_of(model, now))) is not None:
            if isinstance(decision, Exception):
                self._versions.pop(entry.call_id, None)
                yield Fail(entry.call_id, decision)
                continue
            if lacks_adapter and call is not None:
                if not self.adapter_waits.add(entry, call, now, self.room.latest(entry, now)):
                    self._versions.pop(entry.call_id, None)
                    self.room.put_back(entry, now)  # so that its charge is given back
                    self.room.cancel(entry.call_id)
                    yield End(entry.call_id, Ending.NO_ADAPTER)
                continue
            if decision is not None and call is not None and (holder := self._awaited(decision, entry)):
                self.aside.add(entry, call, holder, now)
                continue
            self._versions.pop(entry.call_id, None)
            if decision is not None and decision.worker_id is not None:
                there, where = decision.cached_tokens, decision.worker_id
                yield Send(entry, where, decision.reason, 0, there, decision, cached, entry.holder_wait)

    def _awaited(self, decision: RoutingDecision, entry: WaitingSequence) -> FullHolder | None:
        """Return the worker without room for which a sequence should wait, or None. A sequence with a choice of
        versions does not wait, because all sequences of its call must begin on one version."""
        has_choice = len(self._versions.get(entry.call_id, ANY_VERSION).all) > 1
        return None if has_choice else self.aside.best(entry, decision.full_holders)

    def _assign_aside(self, aside: Aside, now: float) -> Iterator[Instruction]:
        """Yield the instruction for a sequence that is set aside; none if it goes on waiting."""
        entry, key = aside.entry, aside.entry.call_id
        if key not in self.aside:
            return
        free = self._workers.free_tokens(entry.model, aside.worker_id)
        is_over = now >= aside.until or free is None
        if not is_over and free is not None and free < entry.tokens:
            return
        try:
            cached = self._workers.cached_tokens(entry.model, key)
            decision = self._workers.route(replace(aside.call, cached=cached or {}), now)
        except Exception as error:
            self._leave_aside(key)
            yield Fail(key, error)
            return
        if decision.worker_id is not None:
            self._leave_aside(key)
            there, where, wait = decision.cached_tokens, decision.worker_id, aside.wait(now)
            yield Send(entry, where, decision.reason, 0, there, decision, cached, wait)
        elif is_over:
            self.aside.pop(key)
            self.room.put_back(replace(entry, holder_wait=aside.wait(now)), now)

    def _assign_with_adapters(self, model: str, now: float) -> Iterator[Instruction]:
        """Yield the instructions for sequences that wait for adapters. A sequence that fits on no worker with its
        adapter holds back those behind it that wait for the same adapter."""
        for adapter in self.adapter_waits.adapters(model):
            if not self._workers.has_adapter(model, adapter):
                continue
            for wait in self.adapter_waits.in_order(model, adapter):
                entry, key = wait.entry, wait.entry.call_id
                if key not in self.adapter_waits:  # an earlier instruction has ended its call
                    continue
                try:
                    cached = self._workers.cached_tokens(model, key)
                    decision = self._route(replace(wait.call, cached=cached or {}), entry, now)
                except Exception as error:
                    self.adapter_waits.pop(key)
                    self._versions.pop(key, None)
                    yield Fail(key, error)
                    continue
                if decision.worker_id is None:
                    break
                self.adapter_waits.pop(key)
                self._versions.pop(key, None)
                there, where = decision.cached_tokens, decision.worker_id
                yield Send(entry, where, decision.reason, cached_tokens=there, decision=decision, cached=cached)

    def _leave_aside(self, key: str) -> None:
        self.aside.pop(key)
        self._versions.pop(key, None)

    def _call(self, entry: WaitingSequence, cached: Mapping[str, int]) -> RouteCall:
        """Return the routing request of a new sequence. `cached`: see RouteCall."""
        keep_free, versions = self.room.slots_to_keep_free(entry), self._versions.get(entry.call_id, ANY_VERSION)
        first = frozenset((versions.first,)) if versions.first else versions.all
        return RouteCall(
            entry.model,
            entry.tokens,
            keep_free,
            versions=first,
            needs_tools=entry.needs_tools,
            cached=cached,
            affinity=entry.affinity,
            call_id=entry.call_id,
            adapter=entry.adapter,
        )

    def _route(self, call: RouteCall, entry: WaitingSequence, now: float) -> RoutingDecision:
        """Pick a worker for a new sequence. Workers of the sequence's first version are tried first, then workers of
        all versions on which the sequence may begin."""
        versions = self._versions.get(entry.call_id, ANY_VERSION)
        decision = self._workers.route(call, now)
        if decision.worker_id is None and len(versions.all) > 1:
            decision = self._workers.route(replace(call, versions=versions.all), now)
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
        is_suspect = sequence.suspect
        for candidates in self._offered(sequence, view, now):
            if not any(map(may_take_resumed, candidates)):
                continue
            if is_suspect:
                verdict = self.losses.verdict(sequence.lost_links, sequence.lost_at, now)
                if verdict is LossVerdict.WAIT:
                    return
                if verdict is LossVerdict.END:
                    self.resuming.remove(sequence.key)
                    yield End(sequence.key, Ending.BLAMED)
                    return
                if verdict is LossVerdict.ALONE:
                    candidates = [one for one in candidates if not view.runs_suspect(one)]
                else:
                    self.resuming.acquit(sequence.key)
                    yield Acquit(sequence.key)
                    is_suspect = False
            request = resumed_request(sequence, candidates, now)
            decision = pick(request, candidates)
            if decision.worker_id is not None:
                self.resuming.remove(sequence.key)
                worker = next(one for one in candidates if one.worker_id == decision.worker_id)
                uncached = uncached_tokens_at(request, worker)
                yield Send(sequence.entry, worker.worker_id, decision.reason, uncached, decision=decision)
                view.refresh(worker, is_suspect)
                return
        if self._workers.is_replaced(sequence.model, sequence.compatibility):
            self.resuming.remove(sequence.key)
            yield End(sequence.key, Ending.REPLACED)

    def _offered(self, sequence: ResumingSequence, view: _WorkersView, now: float) -> Iterator[Sequence[Candidate]]:
        """Yield the groups of workers to try: only the worker that holds the KV blocks while the sequence must wait for
        it; else a few workers if there are many, and then all workers."""
        holder = view.one(sequence.cached_on) if sequence.cached_on else None
        cached_on = self.resuming.waits_for(sequence.key, now)
        waits = cached_on and cached_on not in sequence.excluded
        if waits and holder is not None and holder.healthy and not holder.draining:
            yield (holder,)
            return
        if len(view) > FEW and (sample := view.sample(sequence, now)):
            others = [worker for worker in sample if worker.incarnation != sequence.cached_on]
            yield others if holder is None else [holder, *others]
        yield view.all()

    def movable(self, sequences: Iterable[ResumingSequence], worker_id: str, now: float) -> Iterator[str]:
        """Yield the keys of the sequences for which another worker has capacity. `sequences` run on the draining worker
        `worker_id`. The caller must move each sequence before it takes the next key."""
        for sequence in sequences:
            view = _WorkersView(self._workers, sequence.model, now)
            request = RouteCall(
                sequence.model,
                sequence.tokens,
                compatibility_key=sequence.compatibility,
                needs_tools=sequence.entry.needs_tools,
                adapter=sequence.entry.adapter,
            )
            for candidates in (view.sample(sequence, now) if len(view) > FEW else (), view.all()):
                if pick(request, [one for one in candidates if one.worker_id != worker_id]).worker_id is not None:
                    yield sequence.key
                    break

    def __repr__(self) -> str:
        return f"SchedulingPolicy({self.room}, {self.resuming})"


class _WorkersView:
    """Cache of one model's workers while a batch of sequences is assigned, since reading all workers for each sequence
    would be slow. After a sequence was sent, its worker is read again."""

    def __init__(self, workers: Workers, model: str, now: float) -> None:
        self._workers = workers
        self._model = model
        self._now = now
        self._read: Sequence[Candidate] | None = None
        self._changed: dict[str, Candidate | None] = {}
        """Workers that were read again, by incarnation; None if the worker has left."""
        self._single: dict[str, Candidate | None] = {}
        self._with_suspect: dict[str, bool] = {}
        """Whether a worker runs a suspect sequence, by incarnation."""

    def _candidates(self) -> Sequence[Candidate]:
        if self._read is None:
            self._read = self._workers.candidates(self._model, self._now, resumed=True)
        return self._read

    def __len__(self) -> int:
        return len(self._candidates())

    def all(self) -> Sequence[Candidate]:
        """All workers of the model."""
        if not self._changed:
            return self._candidates()
        newest = (self._changed.get(worker.incarnation, worker) for worker in self._candidates())
        return [worker for worker in newest if worker is not None]

    def sample(self, sequence: ResumingSequence, now: float) -> Sequence[Candidate]:
        """Return up to CHOICES workers that suit a sequence, of the LOOKED_AT workers that follow a position drawn by
        the sequence's key. Looking at a thousand workers would take milliseconds for each sequence, and the best of a
        few is nearly as good as the best of all (Mitzenmacher 2001)."""
        workers, found = self._candidates(), list[Candidate]()
        start = hash64(sequence.key)
        for step in range(min(LOOKED_AT, len(workers))):
            read = workers[(start + step) % len(workers)]
            worker = self._changed.get(read.incarnation, read)
            if worker is not None and suits(sequence, worker, now):
                found.append(worker)
                if len(found) == CHOICES:
                    break
        return found

    def one(self, incarnation: str) -> Candidate | None:
        """One worker of the model; None if the worker is not linked."""
        if incarnation not in self._single:
            self._single[incarnation] = self._workers.candidate(self._model, incarnation, self._now)
        return self._single[incarnation]

    def runs_suspect(self, worker: Candidate) -> bool:
        """Return whether a worker runs a suspect sequence."""
        if worker.incarnation not in self._with_suspect:
            self._with_suspect[worker.incarnation] = self._workers.runs_suspect(self._model, worker.incarnation)
        return self._with_suspect[worker.incarnation]

    def refresh(self, worker: Candidate, is_suspect: bool) -> None:
        """Read a worker again after a sequence was sent to the worker. `is_suspect`: whether the sequence is
        suspect."""
        self._single.pop(worker.incarnation, None)
        if is_suspect:
            self._with_suspect[worker.incarnation] = True
        if self._read is not None:
            self._changed[worker.incarnation] = self.one(worker.incarnation)
