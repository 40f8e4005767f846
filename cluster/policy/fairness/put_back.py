"""Sequences that were sent, lost their worker, and must start over. They are sent before all other sequences.

Invariant: the order is by class, the highest first. Within a class it is by arrival. Sequences that arrived at the
same time are in the order in which they were added here.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection

from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.fairness.service_counters import FlowKey


class PutBackSequences:
    """The sequences of one model that were sent, lost their worker and must start over. Every operation takes O(number
    of sequences)."""

    def __init__(self) -> None:
        self._entries: list[tuple[int, float, int, WaitingSequence]] = []  # (rank, arrived, number, sequence)
        self._keys: dict[str, tuple[int, float, int]] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, waiting: WaitingSequence) -> None:
        """Insert a sequence. Its call id must not be present."""
        self._number += 1
        key = self._keys[waiting.call_id] = (waiting.rank, waiting.arrived, self._number)
        insort(self._entries, (*key, waiting))

    def replace(self, waiting: WaitingSequence) -> None:
        """Replace the entry of a sequence. Raises KeyError for an unknown id."""
        key = self._keys[waiting.call_id]
        self._entries[bisect_left(self._entries, key)] = (*key, waiting)

    def head(self, passed: Collection[tuple[int, str]] = ()) -> WaitingSequence | None:
        """Return the first sequence that belongs to none of the flows in `passed`, or None if there is none."""
        return next((each[3] for each in self._entries if (each[0], each[3].tenant) not in passed), None)

    def remove(self, call_id: str) -> None:
        """Remove a sequence. Raises KeyError for an unknown id."""
        del self._entries[bisect_left(self._entries, self._keys.pop(call_id))]

    def position(self, call_id: str) -> int:
        """Return how many sequences of the same tenant and class are ahead. Raises KeyError for an unknown id."""
        end = bisect_left(self._entries, self._keys[call_id])
        waiting = self._entries[end][3]
        return self._count(FlowKey(waiting.rank, waiting.tenant), end)

    def count(self, flow: FlowKey) -> int:
        """Return how many sequences of `flow` (one tenant in one class) were put back."""
        return self._count(flow, len(self._entries))

    def _count(self, flow: FlowKey, end: int) -> int:
        return sum(1 for _, _, _, waiting in self._entries[:end] if (waiting.rank, waiting.tenant) == flow)

    def __repr__(self) -> str:
        return f"PutBackSequences({len(self._entries)} waiting)"
