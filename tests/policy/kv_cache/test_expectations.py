"""Tests of the KV blocks that workers are expected to hold soon."""

from __future__ import annotations

import numpy as np

from cluster.policy.kv_cache.expectations import COMPARED, ExpectedBlocks


def test_blocks_that_a_newer_prompt_shares_stay_expected() -> None:
    """When a prompt's blocks expire, those that newer prompts for the same worker share are still expected."""
    expected = ExpectedBlocks()
    expected.add(1, np.array([1, 2, 3], np.uint64), 1.0)
    expected.add(2, np.array([1, 2, 3], np.uint64), 2.0)
    expected.add(1, np.array([1, 2, 4], np.uint64), 3.0)
    (ended,) = expected.pop_due(1.0, 9)[1]
    assert ended.tolist() == [3]


def test_an_expired_prompt_is_compared_with_few_others() -> None:
    """However many prompts share their first block, an expired one is compared with the newest COMPARED of them."""
    expected = ExpectedBlocks()
    for tail in (2, 2, *range(3, 3 + COMPARED)):
        expected.add(1, np.array([1, tail], np.uint64), float(tail))
    (ended,) = expected.pop_due(2.0, 1)[1]
    assert ended.tolist() == [2]
