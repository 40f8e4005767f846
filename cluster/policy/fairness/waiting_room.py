"""Waiting room: admitted sequences that wait for capacity of a worker. The order of the sequences is kept for each
model.

Problem: calls must wait in the gateway and not in an engine, so that the next call is chosen at the last moment. The
wait must be bounded in number, tokens and time, or overload ends in congestion collapse.

Invariants: a sequence that enters leaves exactly once: it is removed by `pop_next` to be sent, cancelled by `cancel`,
returned by `pop_expired`, or shed to make room for another sequence. Only the first sequence of an order may be sent,
so shorter prompts cannot overtake a long prompt for ever. A sequence is shed only to admit a sequence of a higher
class, or a sequence of the same class whose tenant has a shorter queue relative to its weight. A sequence that was put
back is not shed.

Source: late binding as in Pegasus/Sparrow (Ousterhout et al., SOSP 2013); shedding from the longest queue as in longest
queue drop (McKenney, Stochastic Fairness Queueing, 1990).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from cluster.api.outcomes import Outcome
from cluster.policy.fairness.order import Order, WaitingSequence
from cluster.policy.fairness.tenant_queues import TenantQueues
from cluster.policy.fairness.warm_order import LossOf

__all__ = ["Order", "RoomAdmission", "RoomStatistics", "WaitingRoom", "WaitingSequence"]


@dataclass(frozen=True, slots=True)
class RoomStatistics:
    """Current contents of the waiting room, and counts of events.

    `models`: (requests, tokens) of each model with a waiting sequence.
    """

    requests: int
    tokens: int
    models: Mapping[str, tuple[int, int]]
    entered: int
    refused: int
    put_back: int
    bound: int
    cancelled: int
    expired: int
    shed: int = 0


@dataclass(frozen=True, slots=True)
class RoomAdmission:
    """Result of `WaitingRoom.admit`. `shed`: waiting sequences that were removed to make room.

    `outcome`: None if the sequence was admitted, else the reason of the refusal: QUEUE_FULL (the room is full),
    RATE_LIMITED (the tenant's own queue is full) or DEADLINE_UNREACHABLE (no start before the deadline is possible).
    """

    outcome: Outcome | None = None
    shed: tuple[WaitingSequence, ...] = ()


_ADMITTED = RoomAdmission()


@dataclass(slots=True)
class _ModelQueue:
    order: Order
    requests: int = 0
    tokens: int = 0


class WaitingRoom:
    """All sequences that wait in one gateway. Their number and tokens are bounded, for all models together and for each
    tenant."""

    def __init__(
        self,
        *,
        max_requests: int,
        max_tokens: int,
        max_wait_s: float,
        order_of: Callable[[str], Order],
        tenant_max_requests: int | None = None,
        tenant_max_tokens: int | None = None,
        weight_of: Callable[[str], float] = lambda tenant: 1.0,
        longer_s: Callable[[str], float] = lambda model: 0.0,
    ) -> None:
        """Create an empty waiting room.

        `order_of(model)`: returns the order of a model. It is called when the first sequence of the model waits.
        `longer_s(model)`: seconds to add to `max_wait_s` for a sequence that begins to wait now.
        """
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._max_wait_s = max_wait_s
        self._longer_s = longer_s
        self._order_of = order_of
        self._tenant_queues = TenantQueues(weight_of, tenant_max_requests, tenant_max_tokens)
        self._entries: dict[str, tuple[WaitingSequence, int]] = {}  # sequence, number of the stay in the room
        self._queues: dict[str, _ModelQueue] = {}
        self._tokens = 0
        self._expiries: list[tuple[float, int, str]] = []  # (expiry, stay, call id); ended stays are skipped
        self._stays = 0
        self._now = -math.inf
        self._entered = self._refused = self._put_back = self._bound = self._left = self._expired = self._shed = 0

    def admit(self, waiting: WaitingSequence, now: float, starts_in_s: float = 0.0) -> RoomAdmission:
        """Admit a sequence, or return the reason of the refusal. A full room may shed other sequences first.

        The result names the sequences that were shed. They no longer wait, even if the new sequence is refused after
        all. `starts_in_s`: seconds until the earliest possible start; a sequence with an earlier deadline is refused at
        once. Raises ValueError for a call id that already waits.
        """
        if waiting.call_id in self._entries:
            raise ValueError(f"call_id {waiting.call_id!r} already waits")
        outcome = None if self._tenant_queues.has_room(waiting) else Outcome.RATE_LIMITED
        if outcome is None and waiting.deadline is not None and now + starts_in_s >= waiting.deadline:
            outcome = Outcome.DEADLINE_UNREACHABLE
        if outcome is None and self._has_room(waiting):
            self._add(waiting, now).push(waiting, now)
            self._entered += 1
            return _ADMITTED
        return self._admit_by_shedding(waiting, now, outcome)

    def put_back(self, waiting: WaitingSequence, now: float) -> None:
        """Put back a sequence that was sent and lost its worker. It waits at the head for up to max_wait_s, and the
        room's bounds do not apply to it. Raises ValueError for a call id that already waits."""
        if waiting.call_id in self._entries:
            raise ValueError(f"call_id {waiting.call_id!r} already waits")
        self._add(waiting, now, put_back=True).put_back(waiting)
        self._put_back += 1

    def replace(self, waiting: WaitingSequence) -> bool:
        """Replace the entry of a waiting sequence, which keeps its place. Returns False if no sequence with this call
        id waits. `waiting`: an entry with the same call id, model, class, tenant and tokens."""
        entry = self._entries.get(waiting.call_id)
        if entry is None:
            return False
        self._entries[waiting.call_id] = (waiting, entry[1])
        self._tenant_queues.replace(waiting)
        self._queues[waiting.model].order.replace(waiting)
        return True

    def head(self, model: str) -> WaitingSequence | None:
        """Return the next sequence of a model, or None if nothing waits."""
        queue = self._queues.get(model)
        return queue.order.head() if queue is not None else None

    def pop_next(
        self,
        model: str,
        fits: Callable[[WaitingSequence], bool],
        now: float | None = None,
        loss_of: LossOf | None = None,
        passed: Collection[tuple[int, str]] = (),
    ) -> WaitingSequence | None:
        """Remove and return the next sequence of a model, to be sent to a worker. Returns None if nothing waits, or if
        the next sequence does not fit.

        `fits(sequence)`: whether a worker can take the sequence. `now` None: the latest time that was passed to the
        room. `loss_of(sequence)`: expected number of cached prompt tokens that must be computed again if the sequence
        is not sent now; the room's order may prefer sequences with a greater loss. `passed`: ranks and tenants whose
        sequences are passed over.
        """
        queue = self._queues.get(model)
        head = queue.order.head(loss_of, passed) if queue is not None else None
        if head is None or not fits(head):
            return None
        if now is not None and now > self._now:
            self._now = now
        self._remove(head).mark_taken(head.call_id, self._now)
        self._bound += 1
        return head

    def slots_to_keep_free(self, waiting: WaitingSequence, beside: int = 0) -> int:
        """Return how many slots must stay free for other tenants if this waiting sequence is sent next. `beside`:
        number of the model's sequences that were taken and still wait for a certain worker."""
        return self._queues[waiting.model].order.slots_to_keep_free(waiting, beside)

    def cancel(self, call_id: str) -> bool:
        """Cancel a waiting sequence. Returns False if no sequence with this id waits."""
        entry = self._entries.get(call_id)
        if entry is None:
            return False
        self._remove(entry[0]).remove(call_id)
        self._left += 1
        return True

    def pop_expired(self, now: float) -> list[WaitingSequence]:
        """Remove and return all sequences that are past their deadline or have waited for max_wait_s. The one that
        expired first comes first."""
        gone: list[WaitingSequence] = []
        while self._expiries and self._expiries[0][0] <= now:
            _, stay, call_id = heapq.heappop(self._expiries)
            entry = self._entries.get(call_id)
            if entry is not None and entry[1] == stay:
                self._remove(entry[0]).remove(call_id)
                gone.append(entry[0])
        self._expired += len(gone)
        return gone

    def position(self, call_id: str) -> int | None:
        """Return how many sequences are ahead of a waiting sequence in its queue (see `Order.position`). None if no
        sequence with this id waits."""
        entry = self._entries.get(call_id)
        return None if entry is None else self._queues[entry[0].model].order.position(call_id)

    def waiting(self, model: str) -> tuple[int, int]:
        """Return the number of waiting requests of a model, and the number of their prompt tokens."""
        queue = self._queues.get(model)
        return (0, 0) if queue is None else (queue.requests, queue.tokens)

    def latest(self, waiting: WaitingSequence, now: float) -> float:
        """Return the latest time until which a sequence may wait if it begins to wait now."""
        latest = now + self._max_wait_s + self._longer_s(waiting.model)
        deadline = waiting.deadline
        return latest if deadline is None or deadline > latest else deadline

    def statistics(self) -> RoomStatistics:
        """Return a copy of the current contents and counts."""
        return RoomStatistics(
            requests=len(self._entries),
            tokens=self._tokens,
            models={model: (queue.requests, queue.tokens) for model, queue in self._queues.items()},
            entered=self._entered,
            refused=self._refused,
            put_back=self._put_back,
            bound=self._bound,
            cancelled=self._left,
            expired=self._expired,
            shed=self._shed,
        )

    def __repr__(self) -> str:
        return f"WaitingRoom({len(self._entries)} requests, {self._tokens} tokens, {len(self._queues)} models)"

    def _admit_by_shedding(self, waiting: WaitingSequence, now: float, outcome: Outcome | None) -> RoomAdmission:
        """Admit a sequence, and shed other sequences if that is needed to make room. If shedding cannot make
        enough room, refuse the sequence.

        `outcome`: if not None, refuse the sequence for this reason and shed nothing.
        """
        shed: list[WaitingSequence] = []
        while outcome is None and not self._has_room(waiting):
            victim = self._tenant_queues.last_of_longest(below=waiting) if waiting.tokens <= self._max_tokens else None
            if victim is None:
                outcome = Outcome.QUEUE_FULL
                break
            self._remove(victim).remove(victim.call_id)
            shed.append(victim)
        self._shed += len(shed)
        if outcome is not None:
            self._refused += 1
        else:
            self._add(waiting, now).push(waiting, now)
            self._entered += 1
        return RoomAdmission(outcome, tuple(shed))

    def _has_room(self, waiting: WaitingSequence) -> bool:
        return len(self._entries) < self._max_requests and self._tokens + waiting.tokens <= self._max_tokens

    def _add(self, waiting: WaitingSequence, now: float, put_back: bool = False) -> Order:
        """Count a sequence in the room, and store the time at which its wait expires. Returns the order of the
        sequence's model; the caller must then add the sequence to this order."""
        if now > self._now:
            self._now = now
        self._stays = stay = self._stays + 1
        self._entries[waiting.call_id] = (waiting, stay)
        heapq.heappush(self._expiries, (self.latest(waiting, now), stay, waiting.call_id))
        queue = self._queues.get(waiting.model)
        if queue is None:
            queue = self._queues[waiting.model] = _ModelQueue(self._order_of(waiting.model))
        tokens = waiting.tokens
        queue.requests += 1
        queue.tokens += tokens
        self._tokens += tokens
        self._tenant_queues.add(waiting, put_back)
        return queue.order

    def _remove(self, waiting: WaitingSequence) -> Order:
        """Remove a sequence from the room. Returns the order of its model; the caller must remove the sequence from
        this order."""
        entries, queues, expiries = self._entries, self._queues, self._expiries
        del entries[waiting.call_id]
        self._tenant_queues.remove(waiting)
        queue, tokens = queues[waiting.model], waiting.tokens
        queue.tokens -= tokens
        self._tokens -= tokens
        queue.requests = left = queue.requests - 1
        if not left:
            del queues[waiting.model]  # models come and go; `order_of` keeps the orders that must persist
        if len(expiries) > 2 * len(entries) + 64:
            live = {(stay, call_id) for call_id, (_, stay) in entries.items()}
            self._expiries = [item for item in expiries if item[1:] in live]
            heapq.heapify(self._expiries)
        return queue.order
