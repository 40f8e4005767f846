"""Tests of prefix hashes: they depend on every token before, and can be continued anywhere."""

from __future__ import annotations

from array import array

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.kv_cache.prefix_hashes import prefix_hashes, seed_of

IDS = st.lists(st.integers(0, 2**32 - 1), max_size=80)
SIZES = st.sampled_from((1, 2, 3, 16))


@given(IDS, SIZES, st.integers(0, 2**64 - 1), st.data())
def test_a_continued_prompt_has_the_hashes_of_the_whole_prompt(
    ids: list[int], size: int, seed: int, data: st.DataObject
) -> None:
    whole, end = prefix_hashes(array("I", ids), size, seed)
    cut = data.draw(st.integers(0, len(ids) // size)) * size
    before, state = prefix_hashes(ids[:cut], size, seed)
    after, last = prefix_hashes(ids[cut:], size, seed, state)
    assert np.concatenate((before, after)).tolist() == whole.tolist()
    assert last == end
    assert len(whole) == end.blocks == len(ids) // size


@given(IDS.filter(bool), SIZES, st.data())
def test_another_token_changes_all_hashes_from_its_block_on(ids: list[int], size: int, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(ids) - 1))
    other = [*ids[:at], ids[at] ^ 1, *ids[at + 1 :]]
    before, after = (prefix_hashes(given, size, 7)[0].tolist() for given in (ids, other))
    block = at // size
    assert before[:block] == after[:block]
    assert all(one != two for one, two in zip(before[block:], after[block:], strict=True))


def test_blocks_in_another_order_have_other_hashes() -> None:
    one, two = (prefix_hashes(ids, 2, 0)[0].tolist() for ids in ([1, 2, 3, 4, 5, 6], [3, 4, 1, 2, 5, 6]))
    assert not set(one) & set(two)


def test_salt_and_adapter_separate_all_hashes() -> None:
    seeds = [seed_of(*names) for names in (("",), ("a",), ("", "a"), ("a", "b"), ("ab",), ("a", ""))]
    assert seeds[1] == seeds[5]
    hashes = [prefix_hashes(range(32), 4, seed)[0].tolist() for seed in seeds[:5]]
    assert len({value for found in hashes for value in found}) == 5 * 8
