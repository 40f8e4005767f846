"""Tests of a lease, which lets at most one of several processes act at a time, whatever the delays and failures of the
store. When the holder of the lease dies, another process soon acts."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.kube.lease import LeaseCandidate, LeaseRecord, LeaseTerms, LeaseWrite

TERMS = LeaseTerms(lease_s=15.0, yield_s=10.0, again_s=2.0)


@dataclass
class World:
    """A simulated store and candidates. Each candidate has its own clock, and all clocks have the same rate."""

    random: random.Random
    count: int
    record: LeaseRecord | None = None
    now_s: float = 0.0
    version: int = 0
    candidates: list[LeaseCandidate] = field(default_factory=list)
    offsets_s: list[float] = field(default_factory=list)
    dead: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.candidates = [LeaseCandidate(f"c{i}", TERMS) for i in range(self.count)]
        self.offsets_s = [self.random.uniform(0, 1e6) for _ in range(self.count)]

    def clock_s(self, who: int) -> float:
        return self.now_s + self.offsets_s[who]

    def wait(self, most_s: float) -> None:
        """Let time pass, and check that at most one candidate may act afterwards."""
        self.now_s += self.random.uniform(0, most_s)
        acting = [i for i in range(self.count) if self.candidates[i].may_act(self.clock_s(i))]
        assert len(acting) <= 1, f"{acting} act at once"

    def look(self, who: int, failures: float, delay_s: float) -> None:
        """Simulate one read of the lease by candidate number `who`, and a write if the read requires one. Read and
        write may be slow, and may fail before or after they take effect."""
        record = self.record
        self.wait(delay_s)
        if self.random.random() < failures:
            return
        self.candidates[who], write = self.candidates[who].observe(record, self.clock_s(who))
        if write is None:
            return
        began_s = self.clock_s(who)
        self.wait(delay_s)
        if self.random.random() < failures or write.over != self.record:
            return
        self.version += 1
        self.record = LeaseRecord(self.candidates[who].me, str(self.version))
        written = self.record
        self.wait(delay_s)
        if self.random.random() >= failures:
            self.candidates[who] = self.candidates[who].written(written, began_s)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(2, 4),
    failures=st.floats(0, 0.6),
    delay_s=st.floats(0, 8),
)
def test_no_two_act_at_once(seed: int, count: int, failures: float, delay_s: float) -> None:
    """Two candidates never act at the same time, despite slow and failed requests, pauses of any length, and clocks
    that differ. A failed request may still have had its effect."""
    world = World(random.Random(seed), count)
    for _ in range(150):
        world.look(world.random.randrange(count), failures, delay_s)
        world.wait(world.random.choice([TERMS.again_s, TERMS.again_s, 30.0]))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(2, 4))
def test_the_next_acts_soon_after_the_last_has_died(seed: int, count: int) -> None:
    """While the holder runs, no other candidate acts. After the holder's death, another candidate acts within the lease
    time and two reads."""
    world = World(random.Random(seed), count)

    def rounds(alive: list[int], until_s: float) -> None:
        while world.now_s < until_s:
            for who in alive:
                world.look(who, 0, 0.01)
            world.now_s += TERMS.again_s

    rounds(list(range(count)), 60)
    first = [i for i in range(count) if world.candidates[i].may_act(world.clock_s(i))]
    assert len(first) == 1
    transitions = world.record.holder if world.record else ""
    assert transitions == world.candidates[first[0]].me
    died_s = world.now_s
    rest = [i for i in range(count) if i not in first]
    rounds(rest, died_s + TERMS.lease_s + 2 * TERMS.again_s)
    assert [i for i in rest if world.candidates[i].may_act(world.clock_s(i))], "nobody took over"


def test_a_record_that_was_given_up_is_taken_at_once() -> None:
    """A record whose holder gave it up is taken by another candidate at once."""
    candidate = LeaseCandidate("b", TERMS)
    given_up = LeaseRecord("", "7")
    assert candidate.observe(given_up, 0.0)[1] == LeaseWrite(given_up)
    held, write = candidate.observe(LeaseRecord("a", "8"), 0.0)
    assert write is None
    assert held.observe(LeaseRecord("a", "8"), TERMS.lease_s - 0.01)[1] is None
    assert held.observe(LeaseRecord("a", "8"), TERMS.lease_s)[1] == LeaseWrite(LeaseRecord("a", "8"))


def test_terms_that_overlap_are_refused() -> None:
    """LeaseTerms raises ValueError for durations with which two processes could hold the lease at the same time."""
    with pytest.raises(ValueError, match="must hold"):
        LeaseTerms(lease_s=10.0, yield_s=10.0)
