"""Tests of prefix hashes: a hash depends on every token up to its block's end, and hashing can continue after any
block.
"""

from __future__ import annotations

from array import array

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.kv_cache.prefix_hashes import EMPTY, Prefix, next_prefix, prefix_hashes, seed_of

IDS = st.lists(st.integers(0, 2**32 - 1), max_size=80)
SIZES = st.sampled_from((1, 2, 3, 16))


@given(IDS, SIZES, st.integers(0, 2**64 - 1), st.data())
def test_a_continued_prompt_has_the_hashes_of_the_whole_prompt(
    ids: list[int], size: int, seed: int, data: st.DataObject
) -> None:
    whole = prefix_hashes(array("I", ids), size, seed)
    assert len(whole) == len(ids) // size
    cut = data.draw(st.integers(0, len(ids) // size))
    before = prefix_hashes(ids[: cut * size], size, seed)
    after = prefix_hashes(ids[cut * size :], size, seed, Prefix(int(before[-1]), cut) if cut else EMPTY)
    assert np.concatenate((before, after)).tolist() == whole.tolist()


@given(IDS, SIZES, st.integers(0, 2**64 - 1))
def test_blocks_one_by_one_have_the_hashes_of_the_whole_prompt(ids: list[int], size: int, seed: int) -> None:
    prefix, hashes = EMPTY, []
    for at in range(0, len(ids) - size + 1, size):
        prefix = next_prefix(ids[at : at + size], seed, prefix)
        hashes.append(prefix.hash)
    assert hashes == prefix_hashes(ids, size, seed).tolist()
    assert prefix.blocks == len(hashes)


@given(IDS.filter(bool), SIZES, st.data())
def test_another_token_changes_all_hashes_from_its_block_on(ids: list[int], size: int, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(ids) - 1))
    other = [*ids[:at], ids[at] ^ 1, *ids[at + 1 :]]
    before, after = (prefix_hashes(given, size, 7).tolist() for given in (ids, other))
    block = at // size
    assert before[:block] == after[:block]
    assert all(one != two for one, two in zip(before[block:], after[block:], strict=True))


def test_blocks_in_another_order_have_other_hashes() -> None:
    one, two = (prefix_hashes(ids, 2, 0).tolist() for ids in ([1, 2, 3, 4, 5, 6], [3, 4, 1, 2, 5, 6]))
    assert not set(one) & set(two)


def test_salt_and_adapter_separate_all_hashes() -> None:
    seeds = [seed_of(*names) for names in (("",), ("a",), ("", "a"), ("a", "b"), ("ab",), ("a", ""))]
    assert seeds[1] == seeds[5]
    hashes = [prefix_hashes(range(32), 4, seed).tolist() for seed in seeds[:5]]
    assert len({value for found in hashes for value in found}) == 5 * 8
