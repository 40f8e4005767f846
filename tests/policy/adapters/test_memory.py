"""Property tests of the adapters in an engine's memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.policy.adapters.memory import AdapterMemory

DIGESTS = st.sampled_from("abcdefg")


class MemoryMachine(RuleBasedStateMachine):
    """State machine of an adapter memory: loads, uses, drops and pins in any order, compared with a list ordered by
    last use."""

    @initialize(slots=st.integers(1, 3), more=st.integers(0, 2))
    def start(self, slots: int, more: int) -> None:
        self.memory = AdapterMemory(slots, slots + more)
        self.uses: dict[str, int] = {}
        self.order: list[str] = []

    def used(self, digest: str) -> None:
        """Mark an adapter as the most recently used one, if the memory holds it."""
        if digest in self.memory:
            self.order = [*(other for other in self.order if other != digest), digest]

    @rule(digest=DIGESTS)
    def begin(self, digest: str) -> None:
        before = set(self.memory.residents)
        changed = self.memory.begin_use(digest)
        assert changed == (set(self.memory.residents) != before)
        self.uses[digest] = self.uses.get(digest, 0) + 1
        self.used(digest)

    @precondition(lambda self: any(self.uses.values()))
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(name for name, count in self.uses.items() if count)))
        self.uses[digest] -= 1
        assert self.memory.end_use(digest) == (self.uses[digest] == 0)

    @rule(pinned=st.sets(DIGESTS, max_size=3))
    def pin(self, pinned: set[str]) -> None:
        self.memory.pin(pinned)

    @rule(digest=DIGESTS)
    def load(self, digest: str) -> None:
        """Load an adapter as a worker does. While the memory is full, first remove the least recently used adapter that
        no request uses."""
        if digest in self.memory:
            return
        while self.memory.is_full:
            victim = self.memory.victim()
            free = [name for name in self.order if not self.uses.get(name) and name not in self.memory.pinned]
            assert victim == (free[0] if free else None), "the least recently used that may go"
            if victim is None:
                with pytest.raises(ValueError, match="the memory holds"):
                    self.memory.add(digest)
                return
            assert self.memory.has_place_for(digest)
            self.memory.remove(victim)
            self.order.remove(victim)
        self.memory.add(digest)
        self.used(digest)

    @rule(digest=DIGESTS)
    def remove(self, digest: str) -> None:
        self.memory.remove(digest)
        self.order = [other for other in self.order if other != digest]

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "memory"):
            return
        assert list(self.memory.held) == self.order
        assert len(self.memory) <= self.memory.capacity
        assert self.memory.residents == set(self.order[-self.memory.slots :])
        assert all(self.memory.uses(digest) == count for digest, count in self.uses.items())


TestMemory = MemoryMachine.TestCase


@given(st.integers(1, 4), st.sets(DIGESTS, min_size=5))
def test_a_memory_of_pinned_adapters_has_no_place(capacity: int, digests: set[str]) -> None:
    """When pinned adapters fill the memory, no further adapter fits, and every pinned adapter stays."""
    memory = AdapterMemory(1, capacity)
    names = sorted(digests)
    for digest in names[:capacity]:
        memory.add(digest)
    assert memory.has_place_for(names[capacity])
    memory.pin(set(names))
    assert memory.victim() is None
    assert not memory.has_place_for(names[capacity])
    assert all(memory.has_place_for(digest) for digest in names[:capacity])
