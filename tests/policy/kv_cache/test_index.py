"""Tests of the cache index. It is compared with a plain model: a set of blocks for each worker."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.policy.kv_cache.expectations import COMPARED
from cluster.policy.kv_cache.holder_sets import MAX_WORKER
from cluster.policy.kv_cache.index import CacheIndex
from cluster.policy.kv_cache.prefix_hashes import Hashes, prefix_hashes

MULTIPLIER = 0x9A5E_37C1_55D3_0B87
WORKERS = tuple(f"w{number}" for number in range(8))
BLOCKS = 24
PROMPTS = tuple(prefix_hashes(range(start, start + BLOCKS), 1, 0) for start in (0, 1000, 2000))


def blocks(ranges: list[tuple[int, int]], prompt: int) -> Hashes:
    """Return the hashes of the blocks of a prompt that lie in `ranges`, each once. A range is the number of its first
    block and a count."""
    chosen = sorted({number for first, count in ranges for number in range(first, min(first + count, BLOCKS))})
    return PROMPTS[prompt][chosen]


WORKER, PROMPT = st.sampled_from(WORKERS), st.integers(0, len(PROMPTS) - 1)
RANGES = st.lists(st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS)), min_size=1, max_size=3)


class IndexMachine(RuleBasedStateMachine):
    """State machine with random events of eight workers. After all events, `match` must equal the longest prefixes
    found by a simple model of plain sets."""

    def __init__(self) -> None:
        super().__init__()
        self.index = CacheIndex(10_000, MULTIPLIER)
        self.held: dict[str, set[int]] = {}
        self.expected: dict[str, dict[int, list[float]]] = {}
        self.now = 0.0

    @rule(worker=WORKER)
    def join(self, worker: str) -> None:
        self.index.add_worker(worker)
        self.held[worker], self.expected[worker] = set(), {}

    @rule(worker=WORKER)
    def leave(self, worker: str) -> None:
        self.index.remove_worker(worker)
        self.held.pop(worker, None)
        self.expected.pop(worker, None)

    @rule(worker=WORKER, prompt=PROMPT, ranges=RANGES)
    def store(self, worker: str, prompt: int, ranges: list[tuple[int, int]]) -> None:
        found = blocks(ranges, prompt)
        self.index.store(worker, found)
        if worker in self.held:
            self.held[worker] |= set(found.tolist())
            for value in found.tolist():
                self.expected[worker].pop(value, None)

    @rule(worker=WORKER, prompt=PROMPT, ranges=RANGES)
    def remove(self, worker: str, prompt: int, ranges: list[tuple[int, int]]) -> None:
        found = blocks(ranges, prompt)
        self.index.remove(worker, found)
        if worker in self.held:
            self.held[worker] -= set(found.tolist())
            for value in found.tolist():
                self.expected[worker].pop(value, None)

    @rule(worker=WORKER, prompt=PROMPT, count=st.integers(0, BLOCKS), passed=st.floats(0, 3))
    def expect(self, worker: str, prompt: int, count: int, passed: float) -> None:
        self.now += passed
        self.expire()
        found = PROMPTS[prompt][:count]
        self.index.expect(worker, found, self.now + 5.0)
        if worker in self.held:
            for value in found.tolist():
                if value not in self.held[worker]:
                    self.expected[worker].setdefault(value, []).append(self.now + 5.0)

    @rule(passed=st.floats(0, 10))
    def wait(self, passed: float) -> None:
        self.now += passed
        self.expire()

    def expire(self) -> None:
        for _ in range(1000):
            if not self.index.maintain(self.now):
                break
        else:
            raise AssertionError("maintenance does not end")
        for expected in self.expected.values():
            for value in [value for value, ends in expected.items() if max(ends) <= self.now]:
                del expected[value]

    @invariant()
    def matches_equal_the_model(self) -> None:
        for prompt in PROMPTS:
            model = {}
            for worker, held in self.held.items():
                known = held | set(self.expected[worker])
                depth = next((i for i, value in enumerate(prompt.tolist()) if value not in known), len(prompt))
                if depth:
                    model[worker] = depth
            assert self.index.match(prompt) == model


IndexMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestIndexMachine = IndexMachine.TestCase


def test_a_long_prompt_matches_exactly_where_each_worker_ends() -> None:
    index, rng = CacheIndex(100_000, MULTIPLIER), np.random.default_rng(1)
    hashes = prefix_hashes(rng.integers(0, 1000, 8000, np.uint32), 1, 0)
    ends = {f"w{number}": int(rng.integers(1, 8001)) for number in range(50)} | {"whole": 8000, "one": 1}
    for worker, end in ends.items():
        index.add_worker(worker)
        index.store(worker, hashes[:end])
    assert index.match(hashes) == ends
    assert index.match(hashes[:600]) == {worker: min(end, 600) for worker, end in ends.items()}


def test_a_worker_that_has_left_leaves_nothing_behind() -> None:
    index = CacheIndex(100_000, MULTIPLIER)
    hashes = prefix_hashes(range(2000), 1, 0)
    for number in range(20):
        index.add_worker(f"w{number}")
        index.store(f"w{number}", hashes[: 100 * number])
        index.expect(f"w{number}", hashes, 1.0)
        index.remove_worker(f"w{number}")
    assert index.match(hashes) == {}
    while index.maintain(2.0):
        pass
    assert len(index) == 0


def test_equal_prompts_that_expire_together_are_removed_once() -> None:
    """When equal prompts expire in one pass, each of their blocks loses its expected holder once. So other blocks with
    the same holders keep them."""
    index = CacheIndex(1000, MULTIPLIER)
    hashes = prefix_hashes(range(30), 1, 0)
    holders = [f"w{number}" for number in range(6)]
    for name in holders:
        index.add_worker(name)
        index.store(name, hashes[: 4 if name != "w0" else 1])
    for _ in range(2):
        index.expect("w0", hashes[:2], 1.0)
    for tail in range(COMPARED):  # newer prompts with the same beginning, with which the equal ones are compared
        index.expect("w0", hashes[[0, 4 + tail]], 9.0)
    for other in (2, 3):
        index.expect("w0", hashes[other : other + 1], 9.0)
    while index.maintain(2.0):
        pass
    assert set(index.match(hashes[1:2])) == {*holders} - {"w0"}
    index.remove("w5", hashes[3:4])
    assert set(index.match(hashes[2:3])) == {*holders}


def test_numbers_of_workers_are_used_again() -> None:
    index = CacheIndex(1000, MULTIPLIER)
    for number in range(MAX_WORKER):
        index.add_worker(f"w{number}")
    with pytest.raises(OverflowError, match="room for"):
        index.add_worker("one more")
    index.remove_worker("w5")
    while index.maintain(0.0):
        pass
    index.add_worker("one more")


def test_shared_prompts_of_a_thousand_workers_take_little_memory() -> None:
    index = CacheIndex(1 << 20, MULTIPLIER)
    hashes = prefix_hashes(range(1000), 1, 0)
    for number in range(1000):
        index.add_worker(f"w{number}")
        index.store(f"w{number}", hashes)
    assert index.match(hashes) == {f"w{number}": 1000 for number in range(1000)}
    assert index.bytes_used < 2 * 1000 * 1000
