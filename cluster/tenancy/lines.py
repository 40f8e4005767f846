"""Who waits with how much, by tenant and class: whom a full room sheds.

Problem: a full room must shed the lowest class first, and within a class not let the tenant that floods it take the
places of the others. Invariant: the victim is of a class below the newcomer's; or of the newcomer's class, and then its
tenant's line is, weight for weight, longer than the newcomer's would become by entering.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.tenancy.order import Waiting


@dataclass(eq=False, slots=True)
class _Line:
    rank: int
    tenant: str
    waiting: dict[str, Waiting] = field(default_factory=dict)  # in order of arrival here


class Lines:
    """One line for each (rank, tenant), over all models."""

    def __init__(self, weight_of: Callable[[str], float]) -> None:
        self._weight_of = weight_of
        self._lines: dict[tuple[int, str], _Line] = {}
        self._tenants: dict[str, tuple[int, int]] = {}
        self._longest: dict[int, list[tuple[float, str]]] = {}  # rank -> heap of (-length, tenant), lengths may be old

    def tenant(self, tenant: str) -> tuple[int, int]:
        """Requests and tokens of a tenant that wait, in all classes."""
        return self._tenants.get(tenant, (0, 0))

    def add(self, waiting: Waiting) -> None:
        """One waits."""
        key = (waiting.rank, waiting.tenant)
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line(*key)
        line.waiting[waiting.call_id] = waiting
        requests, tokens = self.tenant(waiting.tenant)
        self._tenants[waiting.tenant] = (requests + 1, tokens + waiting.tokens)
        heap = self._longest.setdefault(waiting.rank, [])
        heapq.heappush(heap, (-self._length(line), waiting.tenant))
        if len(heap) > 64 and len(heap) > 4 * len(self._lines):
            self._longest[waiting.rank] = [(-self._length(x), x.tenant) for x in self._of(waiting.rank)]
            heapq.heapify(self._longest[waiting.rank])

    def remove(self, waiting: Waiting) -> None:
        """It waits no longer."""
        key = (waiting.rank, waiting.tenant)
        line = self._lines[key]
        del line.waiting[waiting.call_id]
        requests, tokens = self._tenants[waiting.tenant]
        if requests == 1:
            del self._tenants[waiting.tenant]
        else:
            self._tenants[waiting.tenant] = (requests - 1, tokens - waiting.tokens)
        if not line.waiting:
            del self._lines[key]

    def last_of_longest(self, below: Waiting) -> Waiting | None:
        """Who is to go so that `below` may enter; None where nobody is to be spared less than it."""
        for rank in sorted(self._longest, reverse=True):
            if rank < below.rank:
                break
            line = self._longest_of(rank)
            if line is None:
                continue
            own = self._lines.get((rank, below.tenant))
            would_be = ((len(own.waiting) if own is not None else 0) + 1) / self._weight_of(below.tenant)
            if rank == below.rank and (line is own or self._length(line) <= would_be):
                break
            return line.waiting[next(reversed(line.waiting))]
        return None

    def _longest_of(self, rank: int) -> _Line | None:
        heap = self._longest[rank]
        while heap:
            length, tenant = heap[0]
            line = self._lines.get((rank, tenant))
            if line is None:
                heapq.heappop(heap)
            elif -length > (now := self._length(line)):
                heapq.heapreplace(heap, (-now, tenant))
            else:
                return line
        del self._longest[rank]
        return None

    def _length(self, line: _Line) -> float:
        return len(line.waiting) / self._weight_of(line.tenant)

    def _of(self, rank: int) -> list[_Line]:
        return [line for line in self._lines.values() if line.rank == rank]

    def __repr__(self) -> str:
        return f"Lines({len(self._tenants)} tenants)"
