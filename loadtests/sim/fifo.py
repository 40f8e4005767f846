"""First-come-first-served order of waiting sequences: the baseline for the fair queue."""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Collection

from cluster.policy.fairness.order import WaitingSequence


class FifoOrder:
    """First-come-first-served order. Implements policy.fairness.order.Order.

    Sequences that were put back are first, in the order of arrival.
    """

    def __init__(self) -> None:
        self._returned: list[tuple[float, int, WaitingSequence]] = []
        self._returns = 0
        self._line: OrderedDict[str, WaitingSequence] = OrderedDict()

    def push(self, waiting: WaitingSequence, now: float = 0.0) -> None:
        """Append a sequence to the queue."""
        self._line[waiting.call_id] = waiting

    def put_back(self, waiting: WaitingSequence) -> None:
        """Insert a sequence that returns to the queue. Returned sequences go before all others, in order of their
        arrival."""
        self._returns += 1
        insort(self._returned, (waiting.arrived, self._returns, waiting))

    def replace(self, waiting: WaitingSequence) -> None:
        """Replace the entry of a waiting sequence, which keeps its place."""
        if waiting.call_id in self._line:
            self._line[waiting.call_id] = waiting
        else:
            place = self._place(waiting.call_id)
            self._returned[place] = (*self._returned[place][:2], waiting)

    def head(
        self, loss_of: Callable[[WaitingSequence], float] | None = None, passed: Collection[tuple[int, str]] = ()
    ) -> WaitingSequence | None:
        """Return the first sequence that was put back, else the first sequence in the queue; None if nothing waits, or
        if a tenant is passed over, since this order does not distinguish tenants."""
        if passed:
            return None
        return self._returned[0][2] if self._returned else next(iter(self._line.values()), None)

    def remove(self, call_id: str) -> None:
        """Remove a sequence at any position."""
        if call_id in self._line:
            del self._line[call_id]
        else:
            del self._returned[self._place(call_id)]

    def mark_taken(self, call_id: str, now: float = 0.0) -> None:
        """Remove a sequence that is sent now. This is the same as `remove`, because this order charges nothing."""
        self.remove(call_id)

    def position(self, call_id: str) -> int:
        """Number of sequences ahead of this sequence, including sequences that were put back."""
        if call_id in self._line:
            return len(self._returned) + list(self._line).index(call_id)
        return self._place(call_id)

    def slots_to_keep_free(self, waiting: WaitingSequence, beside: int = 0) -> int:
        """Return 0, because this order does not distinguish tenants."""
        return 0

    def _place(self, call_id: str) -> int:
        for place, (_, _, waiting) in enumerate(self._returned):
            if waiting.call_id == call_id:
                return place
        raise KeyError(call_id)
