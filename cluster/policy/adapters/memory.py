"""The adapters in an engine's memory, and the choice of the adapter that is dropped to make room for another.

Problem: an engine holds a bounded number of adapters, and a catalog may have more. Invariants: at most `capacity`
adapters are held. An adapter that is in use or pinned is never dropped; of the others, the least recently used one is
dropped first.

Source: least recently used, as in vLLM's own cache and in S-LoRA (Sheng et al., MLSys 2024), extended by pins and by
counts of uses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Iterator, Set


class AdapterMemory:
    """The adapters in one engine's memory, by digest. An adapter counts as in use from the first request that needs it,
    even while it is not loaded yet."""

    def __init__(self, slots: int, capacity: int) -> None:
        """`slots`: number of adapters that the engine can use in one step. `capacity`: number of adapters that its
        memory can hold."""
        self.slots = slots
        self.capacity = capacity
        self.pinned: Set[str] = frozenset()
        """Adapters that are never dropped for others. A pin has no effect until the adapter is held, so there may be
        more pins than `capacity`. `pin` sets them."""
        self._held: dict[str, None] = {}
        self._uses: Counter[str] = Counter()
        self._recent: dict[str, None] = {}

    def __contains__(self, digest: object) -> bool:
        return digest in self._held

    def __len__(self) -> int:
        return len(self._held)

    @property
    def held(self) -> Collection[str]:
        """The held adapters, the least recently used first."""
        return self._held.keys()

    @property
    def is_full(self) -> bool:
        """Whether an adapter must be dropped before another can be loaded."""
        return len(self._held) >= self.capacity

    @property
    def residents(self) -> Set[str]:
        """The held adapters in the slots of the engine: the `slots` most recently used ones."""
        return set(list(self._recent)[-self.slots :]) if self.slots else frozenset()

    def pin(self, digests: Set[str]) -> None:
        """Replace the set of pinned adapters, which are never dropped. Digests of adapters that are not held yet are
        allowed, so there may be more pins than `capacity`."""
        self.pinned = digests

    def uses(self, digest: str) -> int:
        """Return the number of requests that use the adapter or wait for it."""
        return self._uses[digest]

    def begin_use(self, digest: str) -> bool:
        """Record that one more request uses the adapter. Returns whether this has changed the set of resident adapters
        (`residents`)."""
        self._uses[digest] += 1
        return self._touch(digest)

    def end_use(self, digest: str) -> bool:
        """Record that a request no longer uses the adapter; return whether no other request uses it."""
        self._uses[digest] -= 1
        if self._uses[digest] > 0:
            return False
        del self._uses[digest]
        return True

    def add(self, digest: str) -> None:
        """Record that the engine holds the adapter. Raises ValueError if the memory is full."""
        if self.is_full and digest not in self._held:
            raise ValueError(f"the memory holds {self.capacity} adapters")
        self._held[digest] = None
        self._touch(digest)

    def remove(self, digest: str) -> None:
        """Record that the engine no longer holds the adapter."""
        self._held.pop(digest, None)
        self._recent.pop(digest, None)

    def victim(self, spared: Container[str] = ()) -> str | None:
        """Return the adapter to drop next; None if all are in use, pinned or among `spared`."""
        return next((digest for digest in self._droppable(spared) if not self._uses[digest]), None)

    def oldest(self, spared: Container[str] = ()) -> str | None:
        """Return the least recently used adapter, even if it is in use; None if all are pinned or among `spared`."""
        return next(self._droppable(spared), None)

    def _droppable(self, spared: Container[str]) -> Iterator[str]:
        return (digest for digest in self._held if digest not in self.pinned and digest not in spared)

    def has_place_for(self, digest: str) -> bool:
        """Return whether the memory holds the adapter, or can hold it once no other adapter is in use. The answer is no
        only if pinned adapters, which are never dropped, fill the memory."""
        kept = sum(held in self.pinned for held in self._held)
        return digest in self._held or kept < self.capacity

    def _touch(self, digest: str) -> bool:
        if digest not in self._held:
            return False
        before = self.residents
        for order in (self._held, self._recent):
            order.pop(digest, None)
            order[digest] = None
        return self.residents != before
