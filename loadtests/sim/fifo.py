"""The plainest order of waiting sequences: the baseline beside the fair queue."""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict

from cluster.policy.fairness.order import WaitingSequence


class FifoOrder:
    """First come, first served; sequences put back come first, by arrival. Implements policy.fairness.order.Order."""

    def __init__(self) -> None:
        self._returned: list[tuple[float, int, WaitingSequence]] = []
        self._returns = 0
        self._line: OrderedDict[str, WaitingSequence] = OrderedDict()

    def push(self, waiting: WaitingSequence, now: float = 0.0) -> None:
        """Append to the queue."""
        self._line[waiting.call_id] = waiting

    def put_back(self, waiting: WaitingSequence) -> None:
        """Insert among those put back, by arrival."""
        self._returns += 1
        insort(self._returned, (waiting.arrived, self._returns, waiting))

    def head(self) -> WaitingSequence | None:
        """The first sequence put back, else the first in the queue."""
        return self._returned[0][2] if self._returned else next(iter(self._line.values()), None)

    def remove(self, call_id: str) -> None:
        """Remove at any position."""
        if call_id in self._line:
            del self._line[call_id]
        else:
            del self._returned[self._place(call_id)]

    def mark_taken(self, call_id: str, now: float = 0.0) -> None:
        """Same as remove: FIFO charges nothing."""
        self.remove(call_id)

    def position(self, call_id: str) -> int:
        """Number of sequences put back and in the queue ahead of it."""
        if call_id in self._line:
            return len(self._returned) + list(self._line).index(call_id)
        return self._place(call_id)

    def _place(self, call_id: str) -> int:
        for place, (_, _, waiting) in enumerate(self._returned):
            if waiting.call_id == call_id:
                return place
        raise KeyError(call_id)
