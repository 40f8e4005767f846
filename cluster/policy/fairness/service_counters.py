"""Tenants' service counters within one model, and whose is the least.

Problem: with ten thousand tenants the least counter must be found in microseconds, while each report moves thousands
of them. So flows lie in buckets of QUANTUM weighted tokens, and a bucket is left only when it is looked at (a rise) or
when the counter falls. Invariant: `least` is in the lowest bucket that holds a flow by its true counter: it is the
least but for less than QUANTUM.
Source: the calendar queue (Brown, CACM 1988), with VTC's counters (Sheng et al., OSDI 2024) as its time.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import deque
from typing import NamedTuple

from cluster.policy.fairness.order import Waiting

QUANTUM = 32.0


class FlowKey(NamedTuple):
    """A tenant within a priority class: 0 is the class that is served first."""

    rank: int
    tenant: str


class Line:
    """First come, first served, by serial numbers; O(1) but for those who leave from the middle."""

    __slots__ = ("_first", "_gone", "_line")

    def __init__(self) -> None:
        self._line: deque[Waiting] = deque()
        self._first = 0  # serial of the first in _line
        self._gone: list[int] | None = None  # serials of those in _line who have left, sorted

    def __len__(self) -> int:
        return len(self._line) - len(self._gone or ())

    def push(self, waiting: Waiting) -> int:
        """The last; its serial number, by which it is known here."""
        self._line.append(waiting)
        return self._first + len(self._line) - 1

    def head(self) -> Waiting | None:
        """The first."""
        return self._line[0] if self._line else None

    def remove(self, serial: int) -> None:
        """Take out, wherever it stands. Once."""
        if serial != self._first:
            self._gone = self._gone or []
            insort(self._gone, serial)
            return
        self._line.popleft()
        self._first += 1
        if self._gone is not None:
            self._skip(self._gone)

    def _skip(self, gone: list[int]) -> None:
        """The first must be one who waits."""
        dropped = 0
        while dropped < len(gone) and gone[dropped] == self._first:
            self._line.popleft()
            self._first += 1
            dropped += 1
        self._gone = gone[dropped:] or None

    def position(self, serial: int) -> int:
        """How many are before it."""
        return serial - self._first - bisect_left(self._gone or (), serial)

    def __repr__(self) -> str:
        return f"Line({len(self)} waiting)"


class Flow(Line):
    """A tenant's line for a model in one class, and its weighted service by its weight (`counter`).

    One object, so that a turn among ten thousand tenants touches little memory that no cache holds.
    """

    __slots__ = (
        "counter", "elsewhere", "elsewhere_service", "here", "here_service", "key", "last_waiting", "since", "weight",
    )  # fmt: skip

    def __init__(self, key: FlowKey) -> None:
        super().__init__()
        self.key = key
        self.weight = 1.0
        self.counter = 0.0
        self.here = 0
        """How many wait in this gateway, those put back included."""
        self.elsewhere = 0
        self.here_service = 0.0
        """Weighted tokens that those who wait here are expected to cost."""
        self.elsewhere_service = 0.0
        self.last_waiting = float("-inf")
        """When it was last known to wait anywhere."""
        self.since = float("-inf")
        """Since when it waits without a pause, where it waits."""

    @property
    def waits(self) -> bool:
        """Whether it is backlogged anywhere."""
        return self.here > 0 or self.elsewhere > 0

    def __repr__(self) -> str:
        return (
            f"Flow({self.key.tenant}/{self.key.rank}: {self.counter:g}, {self.here} here, {self.elsewhere} elsewhere)"
        )


class LeastFirst:
    """Flows by counter; within a bucket who came to it first."""

    def __init__(self, quantum: float = QUANTUM) -> None:
        self._per_token = 1.0 / quantum
        self._buckets: dict[int, deque[Flow]] = {}
        self._order: list[int] = []  # heap of the buckets' numbers
        self._at: dict[Flow, int] = {}  # entries elsewhere than here are old

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, flow: Flow) -> bool:
        return flow in self._at

    def add(self, flow: Flow) -> None:
        """Put in, or in again at its counter."""
        number = int(flow.counter * self._per_token)
        self._at[flow] = number
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = deque()
            heapq.heappush(self._order, number)
        bucket.append(flow)

    def discard(self, flow: Flow) -> None:
        """Take out, if in."""
        self._at.pop(flow, None)

    def fell(self, flow: Flow) -> None:
        """A counter has become less."""
        number = self._at.get(flow)
        if number is not None and int(flow.counter * self._per_token) < number:
            self.add(flow)

    def least(self) -> Flow | None:
        """Whose counter is the least; None when empty. Each entry that is old by now is paid for once."""
        while self._order:
            number = self._order[0]
            bucket = self._buckets[number]
            while bucket:
                flow = bucket[0]
                if self._at.get(flow) == number:
                    if int(flow.counter * self._per_token) <= number:
                        return flow
                    self.add(flow)
                bucket.popleft()
            heapq.heappop(self._order)
            del self._buckets[number]
        return None

    def flows(self) -> list[Flow]:
        """All that are in."""
        return list(self._at)

    def __repr__(self) -> str:
        return f"LeastFirst({len(self._at)} flows in {len(self._buckets)} buckets)"


class ClassTurns:
    """The flows of one class: those that wait here, and those that wait anywhere."""

    def __init__(self) -> None:
        self.flows: dict[str, Flow] = {}
        self.here = LeastFirst()
        self.anywhere = LeastFirst()
        self._last: Flow | None = None

    def floor(self) -> float:
        """Where one that comes back from idle begins: the least backlogged, else who was backlogged last (VTC)."""
        least = self.anywhere.least()
        if least is None:
            least = self._last
        return 0.0 if least is None else least.counter

    def update(self, flow: Flow) -> None:
        """Its counts of waiting have changed."""
        _keep(self.here, flow, flow.here > 0)
        was = flow in self.anywhere
        _keep(self.anywhere, flow, flow.waits)
        if was and not flow.waits and not len(self.anywhere):
            self._last = flow

    def fell(self, flow: Flow) -> None:
        """A counter has become less."""
        self.here.fell(flow)
        self.anywhere.fell(flow)

    def __repr__(self) -> str:
        return f"ClassTurns({len(self.here)} wait here, {len(self.anywhere)} anywhere)"


def _keep(among: LeastFirst, flow: Flow, inside: bool) -> None:
    if not inside:
        among.discard(flow)
    elif flow not in among:
        among.add(flow)
