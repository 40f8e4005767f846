"""Tests of the expected loss of a waiting sequence: the cached tokens of its prompt that may be evicted while it waits.
A change of a worker's free capacity changes the loss at once. Lookups of cached tokens are few."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.scheduling.warm_sequences import (
    FRESH_S,
    MAX_HOLDERS,
    MAX_LOOKUPS,
    MAX_PROMPTS,
    WAIT_S,
    WarmSequences,
)

ENTRY = WaitingSequence("x", "m", "a", 100, None, "standard", 0.0)


class Holders:
    """Workers by id: the prompt tokens that each worker holds, and the tokens for which it has capacity. Implements
    HolderView."""

    def __init__(self, held: Mapping[str, int], room: Mapping[str, int]) -> None:
        self.held = held
        self.room = room
        self.lookups = 0
        self.asked = 0

    def held_tokens(self, model: str, key: str) -> Mapping[str, int]:
        """Implements `HolderView.held_tokens`."""
        self.lookups += 1
        return self.held

    def free_tokens(self, model: str, worker_id: str) -> int | None:
        """Implements `HolderView.free_tokens`."""
        self.asked += 1
        return self.room[worker_id]


@given(workers=st.lists(st.tuples(st.integers(1, 1000), st.sampled_from([0, 99, 100, 500])), max_size=8))
def test_a_sequence_loses_what_a_worker_with_room_holds(workers: list[tuple[int, int]]) -> None:
    """The loss of a sequence is the largest number of its tokens that one worker has cached. Only workers with enough
    capacity count, and only the MAX_HOLDERS workers with the most cached tokens are considered."""
    names = [str(number) for number in range(len(workers))]
    held = dict(zip(names, (tokens for tokens, _ in workers), strict=True))
    view = Holders(held, dict(zip(names, (room for _, room in workers), strict=True)))
    loss = WarmSequences(view).loss_of("m", 0.0)(ENTRY)
    tried = sorted(names, key=lambda name: (held[name], name), reverse=True)[:MAX_HOLDERS]
    assert loss == max((held[name] for name in tried if view.room[name] >= 100), default=0)
    assert view.asked <= MAX_HOLDERS


def test_room_is_read_each_time_and_holders_seldom() -> None:
    """The loss of a sequence (the cached tokens that an eviction would cost it) is 0 as soon as the worker that holds
    its KV blocks is full, because free capacity is read for every decision. The number of tokens that each worker holds
    is read again only after FRESH_S."""
    view = Holders({"w": 80}, {"w": 100})
    warm = WarmSequences(view)
    assert warm.loss_of("m", 0.0)(ENTRY) == 80
    view.room = {"w": 0}
    assert warm.loss_of("m", 0.1)(ENTRY) == 0
    view.room, view.held = {"w": 100}, {"w": 96}
    assert warm.loss_of("m", 0.2)(ENTRY) == pytest.approx(80 * (1 + 0.2 / WAIT_S))
    assert view.lookups == 1
    assert warm.loss_of("m", FRESH_S)(ENTRY) == pytest.approx(96 * (1 + FRESH_S / WAIT_S))


def test_the_loss_grows_with_the_wait() -> None:
    """The loss of a sequence is the number of cached tokens that an eviction would cost it. After a wait of WAIT_S the
    loss counts double, because its blocks are nearer to eviction."""
    warm = WarmSequences(Holders({"w": 80}, {"w": 100}))
    assert warm.loss_of("m", WAIT_S)(ENTRY) == 160
    assert warm.loss_of("m", WAIT_S)(replace(ENTRY, arrived=WAIT_S + 1)) == 80


def test_a_fault_loses_nothing() -> None:
    """If the lookup for a sequence fails, the sequence keeps its place, and the fault does not hold up other
    sequences."""
    assert WarmSequences(Holders({"w": 80}, {})).loss_of("m", 0.0)(ENTRY) == 0


def entries(count: int) -> list[WaitingSequence]:
    """Return waiting sequences."""
    return [replace(ENTRY, call_id=str(number)) for number in range(count)]


def test_a_decision_looks_up_few_prompts() -> None:
    """A decision looks up the holders of at most MAX_LOOKUPS prompts. The next decision looks up further prompts."""
    view = Holders({"w": 80}, {"w": 100})
    warm = WarmSequences(view)
    first, second = (list(map(warm.loss_of("m", 0.0), entries(MAX_LOOKUPS + 3))) for _ in range(2))
    assert first == [80] * MAX_LOOKUPS + [0] * 3
    assert second == [80] * (MAX_LOOKUPS + 3)
    assert view.lookups == MAX_LOOKUPS + 3


def test_memory_is_bounded() -> None:
    """WarmSequences remembers, for the MAX_PROMPTS sequences that were looked up last, which workers hold the prompt.
    It looks up any other sequence again."""
    view = Holders({"w": 80}, {"w": 100})
    warm, sequences = WarmSequences(view), entries(MAX_PROMPTS + 1)
    for entry in sequences:
        warm.loss_of("m", 0.0)(entry)
    warm.loss_of("m", 0.0)(sequences[-1])
    assert view.lookups == MAX_PROMPTS + 1
    warm.loss_of("m", 0.0)(sequences[0])
    assert view.lookups == MAX_PROMPTS + 2
