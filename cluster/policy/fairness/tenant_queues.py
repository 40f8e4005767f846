"""Waiting requests and tokens by tenant and class, and the bounds of each tenant. If the waiting room is full, this
module chooses the sequence to shed (the victim).

Problem: a full waiting room must shed the lowest class first. Within a class, a flooding tenant must not take the
places of other tenants.

Sequences that were put back after their turn are never shed.

Invariant: the victim has a lower class than the new sequence, or it has the same class and its tenant has a longer
queue than the new sequence's tenant. Queue lengths are divided by the tenant's weight. The queue of the new
sequence's tenant includes the new sequence, and no queue includes what was put back.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.policy.fairness.order import WaitingSequence


@dataclass(eq=False, slots=True)
class _TenantQueue:
    tokens: int = 0
    waiting: dict[str, WaitingSequence] = field(default_factory=dict)
    """The sequences that may be shed, by call id, in the order of entry."""
    put_back: set[str] = field(default_factory=set)
    """Call ids of the other sequences."""

    def last(self) -> WaitingSequence:
        """Return the sequence that entered last. Takes O(1), amortised.

        The sequence is removed with `popitem` and added again, because `popitem` frees the places of deleted
        entries at the end of the dict. An iterator would have to pass over these places at each call.
        """
        call_id, waiting = self.waiting.popitem()
        self.waiting[call_id] = waiting
        return waiting


class TenantQueues:
    """Queues of the waiting sequences of all models together, one queue for each tenant and class."""

    def __init__(
        self, weight_of: Callable[[str], float], max_requests: int | None = None, max_tokens: int | None = None
    ) -> None:
        """Create empty queues. `max_requests` and `max_tokens`: bounds of each tenant over all its queues; None for no
        bound."""
        self._weight_of = weight_of
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._ranks: dict[int, dict[str, _TenantQueue]] = {}
        # Heaps of (-length, tenant) by rank; lengths may be outdated. The heaps are kept only while they are used: a
        # room with space needs none, and building them again costs less than updating them for many adds.
        self._longest: dict[int, list[tuple[float, str]]] | None = None
        self._adds_unasked = 0

    def has_room(self, waiting: WaitingSequence) -> bool:
        """Return whether a new sequence fits the bounds of its tenant."""
        most, most_tokens, tenant = self._max_requests, self._max_tokens, waiting.tenant
        if most is None and most_tokens is None:
            return True
        queues = [queues[tenant] for queues in self._ranks.values() if tenant in queues]
        return (most is None or sum(len(queue.waiting) + len(queue.put_back) for queue in queues) < most) and (
            most_tokens is None or sum(queue.tokens for queue in queues) + waiting.tokens <= most_tokens
        )

    def add(self, waiting: WaitingSequence, put_back: bool = False) -> None:
        """Add a waiting sequence. Its call id must not be present. `put_back`: whether it had its turn before."""
        queues = self._ranks.get(waiting.rank)
        if queues is None:
            queues = self._ranks[waiting.rank] = {}
        queue = queues.get(waiting.tenant)
        if queue is None:
            queue = queues[waiting.tenant] = _TenantQueue()
        queue.tokens += waiting.tokens
        if put_back:
            queue.put_back.add(waiting.call_id)
            return
        queue.waiting[waiting.call_id] = waiting
        if self._longest is not None:
            self._note_length(waiting, self._longest)

    def remove(self, waiting: WaitingSequence) -> None:
        """Remove a sequence that no longer waits."""
        queues = self._ranks[waiting.rank]
        queue = queues[waiting.tenant]
        queue.tokens -= waiting.tokens
        if queue.waiting.pop(waiting.call_id, None) is None:
            queue.put_back.remove(waiting.call_id)
        if not queue.waiting and not queue.put_back:
            del queues[waiting.tenant]

    def replace(self, waiting: WaitingSequence) -> None:
        """Replace the entry of a waiting sequence by another with the same call id, class, tenant and tokens."""
        queue = self._ranks[waiting.rank][waiting.tenant]
        if waiting.call_id in queue.waiting:
            queue.waiting[waiting.call_id] = waiting

    def last_of_longest(self, below: WaitingSequence) -> WaitingSequence | None:
        """Return the waiting sequence that is dropped (shed) in favour of the new sequence `below`; None if no sequence
        may be dropped for it."""
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
            return self._ranks[rank][tenant].last()
        return None

    def _note_length(self, waiting: WaitingSequence, longest: dict[int, list[tuple[float, str]]]) -> None:
        most = 64 + 4 * sum(len(queues) for queues in self._ranks.values())
        self._adds_unasked += 1
        if self._adds_unasked > most:
            self._longest = None
            return
        heap = longest.setdefault(waiting.rank, [])
        heapq.heappush(heap, (-self._length(waiting.tenant, waiting.rank), waiting.tenant))
        if len(heap) > most:
            self._longest = self._all_lengths()

    def _all_lengths(self) -> dict[int, list[tuple[float, str]]]:
        out = {rank: [(-self._length(t, rank), t) for t in queues] for rank, queues in self._ranks.items()}
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
        queue = self._ranks[rank].get(tenant)
        return 0.0 if queue is None else len(queue.waiting) / self._weight_of(tenant)

    def __repr__(self) -> str:
        return f"TenantQueues({sum(len(queues) for queues in self._ranks.values())} queues)"
