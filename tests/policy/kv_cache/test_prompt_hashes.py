"""Tests of PromptHashes, which remembers the prefix hashes of earlier prompts."""

from __future__ import annotations

from array import array

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.policy.kv_cache.prefix_hashes import prefix_hashes
from cluster.policy.kv_cache.prompt_hashes import STEP, PromptHashes

BASE = np.random.default_rng(5).integers(0, 128_000, 8 * STEP, np.uint32)

PROMPTS = st.lists(
    st.tuples(st.integers(0, 6 * STEP), st.integers(0, 2 * STEP), st.integers(0, 2), st.sampled_from((1, 7, 16))),
    max_size=12,
)


@settings(deadline=None)
@given(PROMPTS, st.sampled_from((2 * STEP, 100 * STEP)))
def test_remembered_hashes_equal_those_from_scratch(prompts: list[tuple[int, int, int, int]], most: int) -> None:
    """The hashes of a prompt are the same as without a memory, whatever prompts came before and however they begin."""
    memory = PromptHashes(most)
    for shared, own, seed, size in prompts:
        ids = np.concatenate((BASE[:shared], BASE[:own] + np.uint32(1 + own % 3)))
        assert memory.hashes(ids, size, seed).tolist() == prefix_hashes(ids, size, seed).tolist()
        assert memory.tokens <= max(most, 0)


def test_of_a_grown_conversation_only_new_blocks_are_hashed() -> None:
    """When the turns of several conversations with the same long beginning alternate, each block of a conversation is
    hashed only once."""
    memory, size, turns = PromptHashes(), 16, 40
    own = [np.random.default_rng(number).integers(0, 128_000, turns * 500, np.uint32) for number in range(20)]
    for turn in range(1, turns + 1):
        for ids in own:
            memory.hashes(array("I", np.concatenate((BASE, ids[: turn * 500])).tolist()), size, 0)
    whole = sum((len(BASE) + len(ids)) // size for ids in own)
    assert memory.hashed_blocks <= 1.02 * whole
    assert memory.tokens <= sum(len(BASE) + len(ids) for ids in own)
