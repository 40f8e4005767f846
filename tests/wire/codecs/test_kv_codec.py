"""Tests of the messages that report changes of KV blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.link.v1 import link_pb2 as pb
from cluster.policy.kv_cache.changes import KvChange
from cluster.wire.codecs.codec import MAX_KV_BLOCKS, check_kv_blocks
from cluster.wire.codecs.kv_codec import joined_changes, kv_blocks_from_pb, kv_blocks_to_pb

COUNTS = st.sampled_from((0, 1, 5, MAX_KV_BLOCKS - 1, MAX_KV_BLOCKS, MAX_KV_BLOCKS + 1, 2 * MAX_KV_BLOCKS + 3))


def change(is_reset: bool, stored: int, removed: int) -> KvChange:
    """Return a change with `stored` new and `removed` removed blocks."""
    hashes = np.arange(1 << 60, (1 << 60) + stored + removed, dtype=np.uint64)
    return KvChange(is_reset, hashes[:stored], hashes[stored:])


def applied(held: set[int], parts: list[KvChange]) -> set[int]:
    """Return the blocks that a gateway knows after it has applied the changes `parts`, in order, to the blocks
    `held`."""
    for part in parts:
        held = (set() if part.is_reset else held) - set(part.removed.tolist()) | set(part.stored.tolist())
    return held


@settings(deadline=None, max_examples=40)
@given(st.booleans(), COUNTS, COUNTS)
def test_messages_in_order_have_the_effect_of_the_change(is_reset: bool, stored: int, removed: int) -> None:
    whole = change(is_reset, stored, removed)
    messages = list(kv_blocks_to_pb(whole))
    assert sum(map(check_kv_blocks, messages)) == 8 * (stored + removed)
    parts = [kv_blocks_from_pb(pb.KvBlocks.FromString(m.SerializeToString())) for m in messages]
    held = {7, *whole.removed.tolist()}
    assert applied(held, parts) == applied(held, [whole])


BLOCKS = st.lists(st.integers(1, 6), max_size=4, unique=True).map(lambda values: np.array(values, np.uint64))


@given(st.lists(st.builds(KvChange, st.booleans(), BLOCKS, BLOCKS), max_size=6), st.sets(st.integers(1, 6)))
def test_joined_changes_have_the_effect_of_all(changes: list[KvChange], held: set[int]) -> None:
    assert applied(held, [joined_changes(changes)]) == applied(held, changes)


@pytest.mark.parametrize("data", [b"1234567", bytes(8 * MAX_KV_BLOCKS + 8)])
def test_bytes_that_are_no_hashes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="lists of 64-bit hashes"):
        check_kv_blocks(pb.KvBlocks(stored=data))
