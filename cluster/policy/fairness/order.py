"""Interface between the waiting room and an ordering rule, and the simplest rule (FIFO).

Problem: the waiting room enforces bounds and deadlines; which waiting sequence is next is a separate question with
several answers.

Invariants: a sequence that is pushed or put back is removed once, by `taken` or `remove`; `head` is one of those that
wait.

Source: positions by a Fenwick tree (1994). `fair_queue.py` has the weighted fair order of tenants.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class WaitingSequence:
    """A waiting sequence. `tokens` counts its prompt tokens; `deadline` and `arrived` are times, `deadline` None means
    none.

    `rank` is that of its priority class; rank 0 is served first and shed last. `cached_tokens` of the prompt are
    expected in a worker's cache; `output_tokens` is the expected output.
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
    """Order of the sequences that wait for one model. Call ids are unique within it."""

    def push(self, waiting: WaitingSequence, now: float = 0.0) -> None:
        """Append a sequence."""

    def put_back(self, waiting: WaitingSequence) -> None:
        """Insert a sequence that lost its worker before all those that have not had their turn."""

    def head(self) -> WaitingSequence | None:
        """The next sequence; None if nothing waits."""

    def remove(self, call_id: str) -> None:
        """Remove a sequence that has not had its turn. Raises KeyError for an unknown id."""

    def mark_taken(self, call_id: str, now: float) -> None:
        """Remove a sequence that has its turn. Raises KeyError for an unknown id."""

    def position(self, call_id: str) -> int:
        """Number of sequences ahead, as far as its tenant may know. Raises KeyError for an unknown id."""


class FifoOrder:
    """First come, first served; sequences put back come first, in order of arrival.

    Every operation takes O(log n) amortised, except for sequences put back; these are few (the calls of one lost
    worker).
    """

    _COMPACT_ABOVE = 64

    def __init__(self) -> None:
        self._returned: list[tuple[float, int, WaitingSequence]] = []
        self._returned_keys: dict[str, tuple[float, int]] = {}
        self._returns = 0
        self._line: list[WaitingSequence | None] = []  # None: left; skipped, and compacted away later
        self._alive_tree: list[int] = []  # Fenwick tree over _line: 1 for each that still waits
        self._slots: dict[str, int] = {}
        self._first = 0  # no sequence waits before this slot

    @property
    def slots(self) -> int:
        """Slots of the queue, including those whose sequences have left."""
        return len(self._line)

    def push(self, waiting: WaitingSequence, now: float = 0.0) -> None:
        """Append to the queue."""
        self._slots[waiting.call_id] = len(self._line)
        self._line.append(waiting)
        at = len(self._line)
        inner = self._alive_before(at - 1) - self._alive_before(at & (at - 1))
        self._alive_tree.append(inner + 1)

    def put_back(self, waiting: WaitingSequence) -> None:
        """Insert among those put back, by arrival."""
        self._returns += 1
        key = (waiting.arrived, self._returns)
        self._returned_keys[waiting.call_id] = key
        insort(self._returned, (*key, waiting))

    def head(self) -> WaitingSequence | None:
        """The first sequence put back, else the first in the queue."""
        if self._returned:
            return self._returned[0][2]
        while self._first < len(self._line):
            waiting = self._line[self._first]
            if waiting is not None:
                return waiting
            self._first += 1
        return None

    def remove(self, call_id: str) -> None:
        """Remove at any position."""
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

    def mark_taken(self, call_id: str, now: float = 0.0) -> None:
        """Same as remove: FIFO charges nothing."""
        self.remove(call_id)

    def position(self, call_id: str) -> int:
        """Number of sequences put back and in the queue ahead of it."""
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
