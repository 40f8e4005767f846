"""Whose turn it is: the seam between the waiting room and a rule of order, and the plainest rule.

Problem: the room keeps bounds and deadlines; who of those that wait is next is another question, with several answers.
Invariants: what is pushed or put back leaves once, by `taken` or `remove`; `head` is one of those that are in.
Source: positions by a Fenwick tree (1994). Tenants' weighted fair turns are in `fair_queue.py`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Waiting:
    """One that waits. `tokens` are those of its prompt; `deadline` and `arrived` are points in time, None for never.

    `rank` is that of its priority class, 0 the first to be served and the last to be shed. `cached_tokens` of the
    prompt are expected in a worker's cache; `output_tokens` is what is expected to be generated.
    """

    call_id: str
    model: str
    tenant: str
    tokens: int
    deadline: float | None
    priority_class: str
    arrived: float
    rank: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


class Order(Protocol):
    """Whose turn it is among those that wait for one model. Call ids are unique within it."""

    def push(self, waiting: Waiting, now: float = 0.0) -> None:
        """One more, behind those before it."""

    def put_back(self, waiting: Waiting) -> None:
        """One that had its turn and lost its worker: before all that have not had theirs."""

    def head(self) -> Waiting | None:
        """Who is next; None when nobody waits."""

    def remove(self, call_id: str) -> None:
        """It no longer waits, and has not had its turn. KeyError for an unknown id."""

    def taken(self, call_id: str, now: float) -> None:
        """It has its turn. KeyError for an unknown id."""

    def position(self, call_id: str) -> int:
        """How many are before it, as far as its tenant may know. KeyError for an unknown id."""


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

    def push(self, waiting: Waiting, now: float = 0.0) -> None:
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

    def taken(self, call_id: str, now: float = 0.0) -> None:
        """As remove: a turn is a turn."""
        self.remove(call_id)

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
