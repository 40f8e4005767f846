"""Tests of the KV mirror against a model of an engine that may hold several copies of a block."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.api.kv_events import BlocksCleared, BlocksRemoved, BlocksStored
from cluster.policy.kv_cache.prefix_hashes import prefix_hashes, seed_of
from cluster.worker.kv_events.mirror import KvMirror

SIZE = 4
SALTS = ("", "tenant")
Key = tuple[str, tuple[int, ...]]
PROMPTS = st.lists(st.sampled_from((0, 1)), min_size=1, max_size=12).map(
    lambda kinds: tuple(token for kind in kinds for token in range(kind * SIZE, (kind + 1) * SIZE))
)


def hash_of(key: Key) -> int:
    """Return the prefix hash of a block. `key`: a salt, and all tokens from the beginning of the prompt to the end of
    the block."""
    salt, tokens = key
    return int(prefix_hashes(tokens, SIZE, seed_of(salt))[-1])


class Mirrored(RuleBasedStateMachine):
    """A model of an engine that stores the blocks of prompts, some in several copies, and evicts them."""

    def __init__(self) -> None:
        super().__init__()
        self.mirror = KvMirror(SIZE)
        self.copies: Counter[Key] = Counter()
        self.known: set[int] = set()

    @rule(salt=st.sampled_from(SALTS), prompt=PROMPTS, data=st.data())
    def store(self, salt: str, prompt: tuple[int, ...], data: st.DataObject) -> None:
        keys = [(salt, prompt[:end]) for end in range(SIZE, len(prompt) + 1, SIZE)]
        first = data.draw(
            st.integers(0, next((i for i, key in enumerate(keys) if not self.copies[key]), len(keys) - 1))
        )
        new = keys[first:]
        parent = keys[first - 1] if first else None
        self.mirror.apply([BlocksStored(new, parent, prompt[first * SIZE :], SIZE, salt if parent is None else "")])
        self.copies.update(new)

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        held = sorted(key for key, count in self.copies.items() if count)
        if held:
            salt, tokens = data.draw(st.sampled_from(held))
            gone = [key for key in held if key[0] == salt and key[1][: len(tokens)] == tokens]
            self.mirror.apply([BlocksRemoved([key for key in gone for _ in range(self.copies[key])])])
            for key in gone:
                del self.copies[key]

    @rule(data=st.data())
    def evict_a_copy(self, data: st.DataObject) -> None:
        twice = sorted(key for key, count in self.copies.items() if count > 1)
        if twice:
            key = data.draw(st.sampled_from(twice))
            self.mirror.apply([BlocksRemoved([key])])
            self.copies[key] -= 1

    @rule()
    def clear(self) -> None:
        self.mirror.apply([BlocksCleared()])
        self.copies.clear()

    @rule()
    def report(self) -> None:
        change = self.mirror.pop_change()
        stored, removed = set(change.stored.tolist()), set(change.removed.tolist())
        assert (len(stored), len(removed)) == (len(change.stored), len(change.removed))
        if change.is_reset:
            self.known = set()
        held = {hash_of(key) for key, count in self.copies.items() if count}
        assert stored <= held
        assert stored & self.known <= removed, "what the gateway knows is named again only if it was gone meanwhile"
        self.known = (self.known - removed) | stored
        assert self.known == held
        assert not self.mirror.pop_change()

    @invariant()
    def a_new_gateway_gets_all_blocks(self) -> None:
        snapshot = self.mirror.snapshot()
        assert snapshot.is_reset
        assert sorted(snapshot.stored.tolist()) == sorted(hash_of(key) for key, count in self.copies.items() if count)
        assert self.mirror.ignored == 0


Mirrored.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestMirror = Mirrored.TestCase


@pytest.mark.parametrize(
    "event",
    [
        BlocksStored(["b"], "unknown", range(SIZE), SIZE),
        BlocksStored(["b"], None, range(SIZE // 2), SIZE // 2),
        BlocksStored(["b"], None, range(SIZE - 1), SIZE),
        BlocksRemoved(["b"]),
    ],
)
def test_events_that_do_not_fit_are_counted_and_ignored(event: BlocksStored | BlocksRemoved) -> None:
    mirror = KvMirror(SIZE)
    mirror.apply([BlocksStored(["a"], None, range(SIZE), SIZE)])
    before = mirror.pop_change()
    mirror.apply([event])
    assert mirror.ignored == 1
    assert not mirror.pop_change()
    assert np.array_equal(mirror.snapshot().stored, before.stored)


def test_a_block_that_comes_and_goes_between_reports_is_named() -> None:
    """A block that is stored and removed between two reports is reported as removed. A gateway may expect the
    block, and must learn that the worker does not hold it.

    A block that is removed and stored again between two reports is reported as removed and as stored.
    """
    mirror = KvMirror(SIZE)
    mirror.apply([BlocksStored(["a"], None, range(SIZE), SIZE), BlocksRemoved(["a"])])
    change = mirror.pop_change()
    assert (len(change.stored), len(change.removed)) == (0, 1)
    mirror.apply([BlocksStored(["a"], None, range(SIZE), SIZE)])
    mirror.pop_change()
    mirror.apply([BlocksRemoved(["a"]), BlocksStored(["a"], None, range(SIZE), SIZE)])
    change = mirror.pop_change()
    assert change.stored.tolist() == change.removed.tolist() == [hash_of(("", tuple(range(SIZE))))]
