"""Assignment of new sequences: which waiting sequence is sent to which worker.

Sequences that were set aside (set_aside.py) come first, then sequences that wait for a worker with their adapter or of
their version (worker_waits.py), then the others in the order of the waiting room. When a worker has room for the first
sequence of the waiting room, this sequence leaves the room. It is sent, or set aside for the worker that holds its
prompt, or waits for a worker that can serve it. In the last two cases, later sequences need not wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final

from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.routing.router import FullHolder, RouteCall, RoutingDecision
from cluster.policy.routing.version_split import ANY_VERSION
from cluster.policy.scheduling.instructions import End, Ending, Fail, Instruction, Send
from cluster.policy.scheduling.new_sequences import NewSequences
from cluster.policy.scheduling.set_aside import Aside
from cluster.policy.scheduling.warm_sequences import WarmSequences
from cluster.policy.scheduling.worker_waits import Need
from cluster.policy.scheduling.workers import Workers

MAX_PASSED: Final = 16
"""Largest number of tenants' queues that are passed over in one assignment."""


class NewAssignment:
    """Assigns the new sequences of one gateway to workers, for all models. In all methods, `now` is a monotonic time in
    seconds."""

    def __init__(self, queues: NewSequences, workers: Workers) -> None:
        self._queues = queues
        self._room = queues.room
        self._aside = queues.aside
        self._worker_waits = queues.worker_waits
        self._versions = queues.versions
        self._workers = workers
        self._warm = WarmSequences(workers)

    def assign(self, model: str, now: float) -> Iterator[Instruction]:
        """Yield the instructions for a model's new sequences. Sequences that were set aside come first, then sequences
        that wait for a worker which can serve them, then the waiting room. If no worker has room for the first sequence
        of the waiting room, all sequences behind it wait too. A sequence that must not wait beside the queue, because
        too many do, holds back only its own tenant."""
        for aside in self._aside.in_order(model):
            yield from self._assign_aside(aside, now)
        yield from self._assign_waits(model, now)
        decision: RoutingDecision | Exception | None = None
        cached: Mapping[str, int] | None = None
        call: RouteCall | None = None
        need: Need | None = None
        passed: set[tuple[int, str]] = set()
        """The flows that are passed over: ranks and tenants of the queues."""

        def fits(entry: WaitingSequence) -> bool:
            nonlocal decision, cached, call, need
            need = None
            try:
                cached = self._workers.cached_tokens(entry.model, entry.call_id)
                call = self._call(entry, cached or {})
                decision = self._route(call, entry, now)
                if decision.worker_id is None and (call.adapter or decision.is_restricted):  # another may have room
                    need = self._unmet_need(call, entry, now)
                    if need is not None and not self._may_wait_beside(entry, need):
                        passed.add((entry.rank, entry.tenant))
                        return False
            except Exception as error:
                decision = error
                return True
            return decision.worker_id is not None or need is not None

        while True:
            before = len(passed)
            entry = self._room.pop_next(model, fits, now, self._warm.loss_of(model, now), passed)
            if entry is None:
                if before < len(passed) <= MAX_PASSED:
                    continue
                return
            if isinstance(decision, Exception):
                self._queues.forget_versions(entry.call_id)
                yield Fail(entry.call_id, decision)
                continue
            if need is not None and call is not None:
                if need.has_begun or self._worker_waits.has_room(entry):
                    self._worker_waits.add(entry, call, need, now, self._room.latest(entry, now))
                else:
                    self._queues.forget_versions(entry.call_id)
                    self._room.put_back(entry, now)  # so that its charge is given back
                    self._room.cancel(entry.call_id)
                    is_of_version = need.versions or not need.adapter
                    yield End(entry.call_id, Ending.NO_VERSION if is_of_version else Ending.NO_ADAPTER)
                continue
            if decision is not None and call is not None and (holder := self._awaited(decision, entry)):
                self._aside.add(entry, call, holder, now)
                continue
            self._queues.forget_versions(entry.call_id)
            if decision is not None and decision.worker_id is not None:
                there, where = decision.cached_tokens, decision.worker_id
                yield Send(entry, where, decision.reason, 0, there, decision, cached, entry.holder_wait)

    def _awaited(self, decision: RoutingDecision, entry: WaitingSequence) -> FullHolder | None:
        """Return the full worker for which a sequence should be set aside, which means that it waits for this worker
        outside the queue. Returns None if it should not wait.

        A sequence that may begin on several versions is not set aside: while it waited for a worker of one version,
        another sequence of its call could begin on another version. All sequences of a call must run on the same
        version.
        """
        has_choice = len(self._versions.get(entry.call_id, ANY_VERSION).all) > 1
        return None if has_choice else self._aside.best(entry, decision.full_holders)

    def _assign_aside(self, aside: Aside, now: float) -> Iterator[Instruction]:
        """Decide about a sequence that is set aside until the worker that holds its prompt has room. Yield an
        instruction if the sequence is sent or fails. Yield nothing if it must wait longer, or if it has waited the
        longest allowed time and goes back to the waiting room."""
        entry, key = aside.entry, aside.entry.call_id
        if key not in self._aside:
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
            self._aside.pop(key)
            self._room.put_back(replace(entry, holder_wait=aside.wait(now)), now)

    def _unmet_need(self, call: RouteCall, entry: WaitingSequence, now: float) -> Need | None:
        """Return what all workers with room lack for a sequence that no worker can take: its adapter, or one of its
        versions. Returns None if no worker has room. Such a sequence stays in its queue."""
        versions = self._versions.get(entry.call_id, ANY_VERSION)
        any_worker = replace(call, adapter="", versions=frozenset(), bundle_digest="", weight_digest="")
        if self._workers.route(any_worker, now).worker_id is None:
            return None
        return Need(call.adapter, versions.all, versions.has_begun, versions.bundle_digest, versions.weight_digest)

    def _may_wait_beside(self, entry: WaitingSequence, need: Need) -> bool:
        """Return whether a sequence may leave its queue to wait for a worker that can serve it. A sequence for which
        there is no such worker leaves its queue in any case."""
        return self._worker_waits.has_room(entry) or not self._can_be_met(entry.model, need)

    def _assign_waits(self, model: str, now: float) -> Iterator[Instruction]:
        """Yield the instructions for sequences that wait for a worker which can serve them. If no such worker has room
        for a sequence, all later sequences with the same need wait too."""
        for need in self._worker_waits.needs(model):
            if not self._can_be_met(model, need):
                continue
            for wait in self._worker_waits.in_order(model, need):
                entry, key = wait.entry, wait.entry.call_id
                try:
                    cached = self._workers.cached_tokens(model, key)
                    decision = self._route(replace(wait.call, cached=cached or {}), entry, now)
                except Exception as error:
                    self._worker_waits.pop(key)
                    self._queues.forget_versions(key)
                    yield Fail(key, error)
                    continue
                if decision.worker_id is None:
                    break
                self._worker_waits.pop(key)
                self._queues.forget_versions(key)
                there, where = decision.cached_tokens, decision.worker_id
                yield Send(entry, where, decision.reason, cached_tokens=there, decision=decision, cached=cached)

    def _can_be_met(self, model: str, need: Need) -> bool:
        """Return whether some worker takes calls with this need. This check is cheap."""
        if need.adapter and not self._workers.has_adapter(model, need.adapter):
            return False
        return self._workers.has_version(model, need)

    def _leave_aside(self, key: str) -> None:
        self._aside.pop(key)
        self._queues.forget_versions(key)

    def _call(self, entry: WaitingSequence, cached: Mapping[str, int]) -> RouteCall:
        """Return the routing request of a new sequence. `cached`: how many leading tokens of its prompt each worker
        holds in its KV cache, by worker id."""
        beside = self._aside.count(entry.model) + self._worker_waits.count(entry.model)
        keep_free = self._room.slots_to_keep_free(entry, beside)
        versions = self._versions.get(entry.call_id, ANY_VERSION)
        first = frozenset((versions.first,)) if versions.first else versions.all
        return RouteCall(
            entry.model,
            entry.tokens,
            keep_free,
            versions=first,
            bundle_digest=versions.bundle_digest,
            weight_digest=versions.weight_digest,
            has_begun=versions.has_begun,
            needs_tools=entry.needs_tools,
            cached=cached,
            affinity=entry.affinity,
            call_id=entry.call_id,
            adapter=entry.adapter,
        )

    def _route(self, call: RouteCall, entry: WaitingSequence, now: float) -> RoutingDecision:
        """Pick a worker for a new sequence. Workers of the sequence's preferred version (Versions.first) are tried
        first, then workers of all versions on which the sequence may begin."""
        versions = self._versions.get(entry.call_id, ANY_VERSION)
        decision = self._workers.route(call, now)
        if decision.worker_id is None and len(versions.all) > 1:
            decision = self._workers.route(replace(call, versions=versions.all), now)
        return decision
