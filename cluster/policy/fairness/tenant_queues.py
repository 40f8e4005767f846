"""Who waits with how much, by tenant and class: whom a full room sheds.

Problem: a full room must shed the lowest class first, and within a class not let the tenant that floods it take the
places of the others. Invariant: the victim is of a class below the newcomer's; or of the newcomer's class, and then its
tenant's line is, weight for weight, longer than the newcomer's would become by entering.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.policy.fairness.order import Waiting


@dataclass(eq=False, slots=True)
class _TenantQueue:
    requests: int = 0
    tokens: int = 0
    entered: deque[Waiting] = field(default_factory=deque)  # in order, those who have left since among them


class TenantQueues:
    """One line for each tenant in each class, over all models."""

    def __init__(self, weight_of: Callable[[str], float], is_in: Callable[[Waiting], bool]) -> None:
        """`is_in` tells whether one that was added waits still."""
        self._weight_of = weight_of
        self._is_in = is_in
        self._ranks: dict[int, dict[str, _TenantQueue]] = {}
        # rank -> heap of (-length, tenant), lengths may be old. Kept only while somebody asks: a room with place has no
        # use for it, and making it costs less than the adds after which it is dropped.
        self._longest: dict[int, list[tuple[float, str]]] | None = None
        self._adds_unasked = 0

    def tenant(self, tenant: str) -> tuple[int, int]:
        """Requests and tokens of a tenant that wait, in all classes."""
        lines = [lines[tenant] for lines in self._ranks.values() if tenant in lines]
        return sum(line.requests for line in lines), sum(line.tokens for line in lines)

    def add(self, waiting: Waiting) -> None:
        """One waits."""
        lines = self._ranks.get(waiting.rank)
        if lines is None:
            lines = self._ranks[waiting.rank] = {}
        line = lines.get(waiting.tenant)
        if line is None:
            line = lines[waiting.tenant] = _TenantQueue()
        line.requests += 1
        line.tokens += waiting.tokens
        line.entered.append(waiting)
        if len(line.entered) > 2 * line.requests + 32:
            line.entered = deque(one for one in line.entered if self._is_in(one))
        if self._longest is not None:
            self._note_length(waiting, self._longest)

    def remove(self, waiting: Waiting) -> None:
        """It waits no longer."""
        lines = self._ranks[waiting.rank]
        line = lines[waiting.tenant]
        line.requests -= 1
        line.tokens -= waiting.tokens
        if not line.requests:
            del lines[waiting.tenant]

    def last_of_longest(self, below: Waiting) -> Waiting | None:
        """Who is to go so that `below` may enter; None where nobody is to be spared less than it."""
        longest = self._longest = self._longest if self._longest is not None else self._all_lengths()
        self._adds_unasked = 0
        for rank in sorted(longest, reverse=True):
            if rank < below.rank:
                break
            tenant = self._longest_of(longest[rank], rank)
            if tenant is None:
                continue
            if rank == below.rank:
                would_be = self._length(below.tenant, rank) + 1 / self._weight_of(below.tenant)
                if tenant == below.tenant or self._length(tenant, rank) <= would_be:
                    break
            entered = self._ranks[rank][tenant].entered
            while not self._is_in(entered[-1]):
                entered.pop()
            return entered[-1]
        return None

    def _note_length(self, waiting: Waiting, longest: dict[int, list[tuple[float, str]]]) -> None:
        most = 64 + 4 * sum(len(lines) for lines in self._ranks.values())
        self._adds_unasked += 1
        if self._adds_unasked > most:
            self._longest = None
            return
        heap = longest.setdefault(waiting.rank, [])
        heapq.heappush(heap, (-self._length(waiting.tenant, waiting.rank), waiting.tenant))
        if len(heap) > most:
            self._longest = self._all_lengths()

    def _all_lengths(self) -> dict[int, list[tuple[float, str]]]:
        out = {rank: [(-self._length(t, rank), t) for t in lines] for rank, lines in self._ranks.items()}
        for heap in out.values():
            heapq.heapify(heap)
        return out

    def _longest_of(self, heap: list[tuple[float, str]], rank: int) -> str | None:
        while heap:
            length, tenant = heap[0]
            now = self._length(tenant, rank)
            if not now:
                heapq.heappop(heap)
            elif -length > now:
                heapq.heapreplace(heap, (-now, tenant))
            else:
                return tenant
        return None

    def _length(self, tenant: str, rank: int) -> float:
        line = self._ranks[rank].get(tenant)
        return 0.0 if line is None else line.requests / self._weight_of(tenant)

    def __repr__(self) -> str:
        return f"Lines({sum(len(lines) for lines in self._ranks.values())} lines)"
