"""The waiting room: what has been admitted and waits for a worker's room, one order a model.

Problem: calls must wait in the gateway rather than in an engine, so that who is next is decided at the last moment;
and the wait must be bounded in number, tokens and time, or an overload ends in a collapse.
Invariants: what enters leaves exactly once (bound by `next`, cancelled by `leave`, or `expired`); the room's counts
are those of its entries; only the head of an order may be bound, so that a long prompt is not overtaken for ever.
Source: late binding as in Pegasus/Sparrow (Ousterhout et al., SOSP 2013); positions by a Fenwick tree (1994).

`Order` is the seam: first come, first served now; tenants' weighted fair turns take its place.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from cluster.api.outcomes import Outcome


@dataclass(frozen=True, slots=True)
class Waiting:
    """One that waits. `tokens` are those of its prompt; `deadline` and `arrived` are points in time, None for never."""

    call_id: str
    model: str
    tenant: str
    tokens: int
    deadline: float | None
    priority_class: str
    arrived: float


class Order(Protocol):
    """Whose turn it is among those that wait for one model. Call ids are unique within it."""

    def push(self, waiting: Waiting) -> None:
        """One more, behind those before it."""

    def put_back(self, waiting: Waiting) -> None:
        """One that had its turn and lost its worker: before all that have not had theirs."""

    def head(self) -> Waiting | None:
        """Who is next; None when nobody waits."""

    def remove(self, call_id: str) -> None:
        """It no longer waits. KeyError for an unknown id."""

    def position(self, call_id: str) -> int:
        """How many are before it. KeyError for an unknown id."""


class FifoOrder:
    """First come, first served; those put back first, in the order in which they arrived.

    Every operation is O(log n) amortised, but for those put back, who are few (one lost worker's calls).
    """

    _COMPACT_ABOVE = 64

    def __init__(self) -> None:
        self._returned: list[tuple[float, int, Waiting]] = []
        self._returned_keys: dict[str, tuple[float, int]] = {}
        self._returns = 0
        self._line: list[Waiting | None] = []  # None: left; skipped and in time compacted away
        self._alive_tree: list[int] = []  # Fenwick tree over _line: 1 for each that still waits
        self._slots: dict[str, int] = {}
        self._first = 0  # nobody waits before this slot

    @property
    def slots(self) -> int:
        """Slots of the line, those already left included."""
        return len(self._line)

    def push(self, waiting: Waiting) -> None:
        """Append to the line."""
        self._slots[waiting.call_id] = len(self._line)
        self._line.append(waiting)
        at = len(self._line)
        inner = self._alive_before(at - 1) - self._alive_before(at & (at - 1))
        self._alive_tree.append(inner + 1)

    def put_back(self, waiting: Waiting) -> None:
        """Insert among those put back, by arrival."""
        self._returns += 1
        key = (waiting.arrived, self._returns)
        self._returned_keys[waiting.call_id] = key
        insort(self._returned, (*key, waiting))

    def head(self) -> Waiting | None:
        """The first put back, else the first in line."""
        if self._returned:
            return self._returned[0][2]
        while self._first < len(self._line):
            waiting = self._line[self._first]
            if waiting is not None:
                return waiting
            self._first += 1
        return None

    def remove(self, call_id: str) -> None:
        """Take out, wherever it stands."""
        key = self._returned_keys.pop(call_id, None)
        if key is not None:
            del self._returned[bisect_left(self._returned, key)]
            return
        slot = self._slots.pop(call_id)
        self._line[slot] = None
        at = slot + 1
        while at <= len(self._line):
            self._alive_tree[at - 1] -= 1
            at += at & -at
        if len(self._line) > self._COMPACT_ABOVE and len(self._slots) < len(self._line) // 2:
            self._compact()

    def position(self, call_id: str) -> int:
        """Those put back before it and those in line before it."""
        key = self._returned_keys.get(call_id)
        if key is not None:
            return bisect_left(self._returned, key)
        return len(self._returned) + self._alive_before(self._slots[call_id])

    def _alive_before(self, slot: int) -> int:
        count = 0
        while slot:
            count += self._alive_tree[slot - 1]
            slot &= slot - 1
        return count

    def _compact(self) -> None:
        self._line = [waiting for waiting in self._line if waiting is not None]
        self._slots = {waiting.call_id: slot for slot, waiting in enumerate(self._line) if waiting is not None}
        self._alive_tree = [at & -at for at in range(1, len(self._line) + 1)]  # all alive: a node sums its range
        self._first = 0

    def __repr__(self) -> str:
        return f"FifoOrder({len(self._returned)} put back, {len(self._slots)} in line)"


@dataclass(frozen=True, slots=True)
class RoomStatistics:
    """What waits now, and what has become of those that came. `models`: (requests, tokens) of each that has any."""

    requests: int
    tokens: int
    models: Mapping[str, tuple[int, int]]
    entered: int
    refused: int
    put_back: int
    bound: int
    left: int
    expired: int


@dataclass(slots=True)
class _ModelQueue:
    order: Order
    requests: int = 0
    tokens: int = 0


class WaitingRoom:
    """All that wait in one gateway. Bounds are over all models together."""

    def __init__(
        self,
        *,
        max_requests: int,
        max_tokens: int,
        max_wait_s: float,
        order: Callable[[], Order] = FifoOrder,
    ) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._max_wait_s = max_wait_s
        self._new_order = order
        self._entries: dict[str, tuple[Waiting, int]] = {}  # with the number of its stay
        self._queues: dict[str, _ModelQueue] = {}
        self._tokens = 0
        self._expiries: list[tuple[float, int, str]] = []  # (when, stay, call id); stays that ended are skipped
        self._stays = 0
        self._entered = self._refused = self._put_back = self._bound = self._left = self._expired = 0

    def enter(self, waiting: Waiting, now: float) -> Outcome | None:
        """Take one in: None; or QUEUE_FULL, and nothing has changed. ValueError for a call id that waits already."""
        if len(self._entries) >= self._max_requests or self._tokens + waiting.tokens > self._max_tokens:
            self._refused += 1
            return Outcome.QUEUE_FULL
        self._add(waiting, now).push(waiting)
        self._entered += 1
        return None

    def put_back(self, waiting: Waiting, now: float) -> None:
        """One whose worker was lost waits again, at the head and with a new max_wait_s. It was admitted: no bound."""
        self._add(waiting, now).put_back(waiting)
        self._put_back += 1

    def next(self, model: str, fits: Callable[[Waiting], bool]) -> Waiting | None:
        """Take out whose turn it is, if it fits; None when nobody waits or the head does not fit."""
        queue = self._queues.get(model)
        head = queue.order.head() if queue is not None else None
        if head is None or not fits(head):
            return None
        self._remove(head)
        self._bound += 1
        return head

    def leave(self, call_id: str) -> bool:
        """Cancel; False for one that does not wait."""
        entry = self._entries.get(call_id)
        if entry is None:
            return False
        self._remove(entry[0])
        self._left += 1
        return True

    def expired(self, now: float) -> list[Waiting]:
        """Take out all whose deadline has passed or who have waited max_wait_s, the longest overdue first."""
        gone: list[Waiting] = []
        while self._expiries and self._expiries[0][0] <= now:
            _, stay, call_id = heapq.heappop(self._expiries)
            entry = self._entries.get(call_id)
            if entry is not None and entry[1] == stay:
                self._remove(entry[0])
                gone.append(entry[0])
        self._expired += len(gone)
        return gone

    def position(self, call_id: str) -> int | None:
        """How many of its model are before it; None for one that does not wait."""
        entry = self._entries.get(call_id)
        return None if entry is None else self._queues[entry[0].model].order.position(call_id)

    def waiting(self, model: str) -> tuple[int, int]:
        """Requests and prompt tokens that wait for a model."""
        queue = self._queues.get(model)
        return (0, 0) if queue is None else (queue.requests, queue.tokens)

    def statistics(self) -> RoomStatistics:
        """Frozen counts."""
        return RoomStatistics(
            requests=len(self._entries),
            tokens=self._tokens,
            models={model: (queue.requests, queue.tokens) for model, queue in self._queues.items()},
            entered=self._entered,
            refused=self._refused,
            put_back=self._put_back,
            bound=self._bound,
            left=self._left,
            expired=self._expired,
        )

    def __repr__(self) -> str:
        return f"WaitingRoom({len(self._entries)} requests, {self._tokens} tokens, {len(self._queues)} models)"

    def _add(self, waiting: Waiting, now: float) -> Order:
        if waiting.call_id in self._entries:
            raise ValueError(f"call_id {waiting.call_id!r} waits already")
        self._stays += 1
        self._entries[waiting.call_id] = (waiting, self._stays)
        expires = min(now + self._max_wait_s, math.inf if waiting.deadline is None else waiting.deadline)
        heapq.heappush(self._expiries, (expires, self._stays, waiting.call_id))
        queue = self._queues.get(waiting.model)
        if queue is None:
            queue = self._queues[waiting.model] = _ModelQueue(self._new_order())
        queue.requests += 1
        queue.tokens += waiting.tokens
        self._tokens += waiting.tokens
        return queue.order

    def _remove(self, waiting: Waiting) -> None:
        del self._entries[waiting.call_id]
        queue = self._queues[waiting.model]
        queue.order.remove(waiting.call_id)
        queue.requests -= 1
        queue.tokens -= waiting.tokens
        self._tokens -= waiting.tokens
        if not queue.requests:
            del self._queues[waiting.model]  # models come and go; an empty order holds nothing worth keeping
        if len(self._expiries) > 64 and len(self._expiries) > 2 * len(self._entries):
            live = {(stay, call_id) for call_id, (_, stay) in self._entries.items()}
            self._expiries = [item for item in self._expiries if item[1:] in live]
            heapq.heapify(self._expiries)
