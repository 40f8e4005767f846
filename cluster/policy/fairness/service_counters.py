"""Service counters of tenants within one model, with a fast lookup of the tenant with the least counter.

Problem: among ten thousand tenants the least counter must be found in microseconds, while each report changes thousands
of counters.

Method: flows (queues of tenants) are kept in buckets by their counters, each bucket QUANTUM wide. A flow is moved to
another bucket only when its counter falls, or when the lookup finds that its counter has risen.

Invariant: `least` returns a flow from the lowest bucket, as if every flow were moved at once whenever its counter
changes. So the counter of the returned flow is at most QUANTUM above the least counter.

Source: the calendar queue (Brown, CACM 1988). The counters of VTC (Sheng et al., OSDI 2024) take the place of the times
in a calendar queue.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Collection
from typing import NamedTuple

from cluster.policy.fairness.order import WaitingSequence

QUANTUM = 32.0
MAX_HOLES = 64
"""Number of holes in a queue that are always tolerated."""


class FlowKey(NamedTuple):
    """A tenant and the rank of a priority class. Rank 0 is the highest class, which is served first."""

    rank: int
    tenant: str


class FifoQueue:
    """FIFO queue whose entries have serial numbers, and from whose middle entries can be removed.

    An entry that is removed from the middle leaves a hole, until it is at an end of the queue or there are more holes
    than entries (and more than MAX_HOLES). So memory is in proportion to the number of entries, and no operation looks
    at more than MAX_HOLES holes for long: `first` closes the holes when it has passed more. Operations take O(1),
    amortised; a removal from the middle and `position` take O(log n), and moving the later holes' numbers in memory.
    """

    __slots__ = ("_entries", "_holes", "_next", "_serials", "_start")

    def __init__(self) -> None:
        self._entries: list[WaitingSequence | None] = []
        """Entries in the order of arrival; None for a hole. The first from `_start` on and the last are no holes."""
        self._serials: list[int] = []
        """Serial number of each place in `_entries`."""
        self._start = 0
        """Number of places at the beginning of `_entries` whose entries have left."""
        self._holes: list[int] = []
        """Serial numbers of the holes from `_start` on, in ascending order."""
        self._next = 0

    def __len__(self) -> int:
        return len(self._entries) - self._start - len(self._holes)

    def push(self, waiting: WaitingSequence) -> int:
        """Append an entry. Returns the serial number of the entry."""
        serial = self._next
        self._next = serial + 1
        self._entries.append(waiting)
        self._serials.append(serial)
        return serial

    def replace(self, serial: int, waiting: WaitingSequence) -> None:
        """Replace the entry with this serial number."""
        self._entries[bisect_left(self._serials, serial, self._start)] = waiting

    def head(self) -> WaitingSequence | None:
        """Return the first entry, or None if the queue is empty."""
        return self._entries[self._start] if self._entries else None

    def first(self, count: int) -> list[WaitingSequence]:
        """Return the first `count` entries, or all entries if there are fewer."""
        out: list[WaitingSequence] = []
        at, end = self._start, len(self._entries)
        while at < end and len(out) < count:
            if (waiting := self._entries[at]) is not None:
                out.append(waiting)
            at += 1
        if at - self._start - len(out) > MAX_HOLES:
            self._close_holes(at)
        return out

    def remove(self, serial: int) -> None:
        """Remove an entry at any position. Each serial number must be removed only once."""
        entries, serials = self._entries, self._serials
        if serial == serials[self._start]:
            self._remove_head()
        elif serial == serials[-1]:
            self._remove_last()
        else:
            entries[bisect_left(serials, serial, self._start)] = None
            insort(self._holes, serial)
            if len(self._holes) > max(MAX_HOLES, len(self)):
                self._close_holes(len(entries))

    def _remove_head(self) -> None:
        """Remove the first entry and the holes behind it."""
        entries, end = self._entries, len(self._entries)
        entries[self._start] = None
        at = self._start + 1
        while at < end and entries[at] is None:
            at += 1
        del self._holes[: at - self._start - 1]
        self._start = at
        if at == end or 2 * at > max(end, 2 * MAX_HOLES):
            del entries[:at], self._serials[:at]
            self._start = 0

    def _remove_last(self) -> None:
        """Remove the last entry, which is not the first, and the holes before it."""
        entries, serials = self._entries, self._serials
        entries[-1] = None
        while entries[-1] is None:  # ends at the first entry at the latest
            del entries[-1], serials[-1]
        del self._holes[bisect_left(self._holes, serials[-1]) :]

    def _close_holes(self, end: int) -> None:
        """Close the holes among the places before `end`."""
        kept = [at for at in range(self._start, end) if self._entries[at] is not None]
        del self._holes[: end - self._start - len(kept)]
        self._serials[:end] = [self._serials[at] for at in kept]
        self._entries[:end] = [self._entries[at] for at in kept]
        self._start = 0

    def position(self, serial: int) -> int:
        """Number of entries ahead of the entry with this serial number."""
        at = bisect_left(self._serials, serial, self._start)
        return at - self._start - bisect_left(self._holes, serial)

    def __repr__(self) -> str:
        return f"FifoQueue({len(self)} waiting)"


class Flow(FifoQueue):
    """Queue of one tenant for one model and class. `counter`: weighted tokens served, divided by the tenant's weight.

    `here` and `here_service`: number and expected cost of the sequences that wait on this gateway. `elsewhere` and
    `elsewhere_service`: the same for all other gateways together. Queue and counter are one object, because a choice
    among ten thousand tenants should touch little uncached memory.
    """

    __slots__ = (
        "counter", "elsewhere", "elsewhere_service", "here", "here_service", "key", "last_waiting", "overtaken",
        "since", "weight",
    )  # fmt: skip

    def __init__(self, key: FlowKey) -> None:
        super().__init__()
        self.key = key
        self.weight = 1.0
        self.counter = 0.0
        self.here = 0
        """Number of sequences that wait on this gateway, including sequences that were put back."""
        self.elsewhere = 0
        self.here_service = 0.0
        """Expected cost of the sequences that wait on this gateway, in weighted tokens."""
        self.elsewhere_service = 0.0
        self.last_waiting = float("-inf")
        """Last time when the flow was known to wait on any gateway."""
        self.since = float("-inf")
        """Start of the current uninterrupted wait, if the flow waits."""
        self.overtaken = 0
        """Number of turns in a row in which another sequence than the first one was sent."""

    def record_turn(self, serial: int) -> None:
        """Record that the sequence with this serial number is being sent. Call this method before `remove`."""
        self.overtaken = 0 if serial == self._serials[self._start] else self.overtaken + 1

    @property
    def waits(self) -> bool:
        """Whether any sequence of the flow waits, on this gateway or on another."""
        return self.here > 0 or self.elsewhere > 0

    def __repr__(self) -> str:
        return (
            f"Flow({self.key.tenant}/{self.key.rank}: {self.counter:g}, {self.here} here, {self.elsewhere} elsewhere)"
        )


class LeastFirst:
    """Flows (queues of one tenant each), sorted into buckets by their service counter. The lowest bucket comes first.
    Within a bucket: first in, first out."""

    def __init__(self, quantum: float = QUANTUM) -> None:
        self._per_token = 1.0 / quantum
        self._buckets: dict[int, deque[Flow]] = {}
        self._order: list[int] = []  # heap of the buckets' numbers
        self._at: dict[Flow, int] = {}  # current bucket of each flow; entries in other buckets are outdated

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, flow: Flow) -> bool:
        return flow in self._at

    def add(self, flow: Flow) -> None:
        """Add a flow. A flow that is present already is moved to the bucket of its counter."""
        self._add(flow, int(flow.counter * self._per_token))

    def _add(self, flow: Flow, number: int) -> None:
        self._at[flow] = number
        bucket = self._buckets.get(number)
        if bucket is None:
            self._buckets[number] = deque((flow,))
            heapq.heappush(self._order, number)
        else:
            bucket.append(flow)

    def discard(self, flow: Flow) -> None:
        """Remove a flow, if the flow is present."""
        self._at.pop(flow, None)

    def note_decrease(self, flow: Flow) -> None:
        """Move a flow to a lower bucket after its counter has fallen. A flow that is not present is ignored."""
        number = self._at.get(flow)
        if number is not None and (lower := int(flow.counter * self._per_token)) < number:
            self._add(flow, lower)

    def least(self) -> Flow | None:
        """Return a flow from the lowest bucket of service counters; None if there are no flows. The current counters
        decide, even if a counter has grown since the flow was added."""
        order, at, per_token = self._order, self._at, self._per_token
        while order:
            number = order[0]
            bucket = self._buckets[number]
            while bucket:
                flow = bucket[0]
                if at.get(flow) == number:
                    current = int(flow.counter * per_token)
                    if current <= number:
                        return flow
                    self._add(flow, current)
                bucket.popleft()
            heapq.heappop(order)
            del self._buckets[number]
        return None

    def least_without(self, keys: Collection[tuple[int, str]]) -> Flow | None:
        """Return the flow with the lowest service counter of those whose keys are not in `keys`. O(flows)."""
        return min((flow for flow in self._at if flow.key not in keys), key=lambda flow: flow.counter, default=None)

    def flows(self) -> list[Flow]:
        """Return all flows."""
        return list(self._at)

    def __repr__(self) -> str:
        return f"LeastFirst({len(self._at)} flows in {len(self._buckets)} buckets)"


class ClassTurns:
    """The flows (tenant queues) of one priority class. `flows`: all flows, by tenant. `here`: the flows with sequences
    that wait at this gateway. `anywhere`: the flows with sequences that wait at any gateway."""

    def __init__(self) -> None:
        self.flows: dict[str, Flow] = {}
        self.here = LeastFirst()
        self.anywhere = LeastFirst()
        self._last: Flow | None = None

    def floor(self) -> float:
        """Return the floor: the least counter that a flow may have when it waits again after a long idle time. A
        smaller counter is raised to the floor.

        The floor is the least counter of all backlogged flows. If no flow is backlogged, the floor is the counter of
        the flow that was backlogged last. Source: the counter lift of VTC (Virtual Token Counter).
        """
        least = self.anywhere.least()
        if least is None:
            least = self._last
        return 0.0 if least is None else least.counter

    def update(self, flow: Flow) -> None:
        """Update the lists of waiting flows after the waiting counts of a flow have changed."""
        _keep(self.here, flow, flow.here > 0)
        was = flow in self.anywhere
        _keep(self.anywhere, flow, flow.waits)
        if was and not flow.waits and not len(self.anywhere):
            self._last = flow

    def note_decrease(self, flow: Flow) -> None:
        """Update the order of the waiting flows after a decrease of one flow's service counter."""
        self.here.note_decrease(flow)
        self.anywhere.note_decrease(flow)

    def __repr__(self) -> str:
        return f"ClassTurns({len(self.here)} wait here, {len(self.anywhere)} anywhere)"


def _keep(among: LeastFirst, flow: Flow, inside: bool) -> None:
    if not inside:
        among.discard(flow)
    elif flow not in among:
        among.add(flow)
