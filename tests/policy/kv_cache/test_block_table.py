"""Tests of the hash table of KV blocks: it agrees with a dict, grows by dividing segments, and its size is bounded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.policy.kv_cache.block_table import BYTES_PER_PLACE, SEGMENT, BlockTable
from cluster.policy.kv_cache.prefix_hashes import Hashes

MULTIPLIER = 0x9A5E_37C1_55D3_0B87


def hashes_of(values: list[int]) -> Hashes:
    """Return hashes for small numbers. The bits of the hashes are well mixed."""
    return np.array(values, np.uint64) * np.uint64(0xD6E8FEB86659FD93) + np.uint64(1)


BATCHES = st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 300), max_size=60, unique=True)), max_size=20)


@settings(deadline=None)
@given(BATCHES)
def test_it_holds_what_a_dict_holds(batches: list[tuple[bool, list[int]]]) -> None:
    table, model = BlockTable(10_000, MULTIPLIER), dict[int, int]()
    for number, (adds, values) in enumerate(batches, 1):
        if adds:
            places = table.insert(hashes_of(values))
            table.set(places, np.full(len(values), number, np.uint64))
            model.update(dict.fromkeys(values, number))
        else:
            places = table.find(hashes_of(values))
            table.set(places[places >= 0], np.zeros((places >= 0).sum(), np.uint64))
            for value in values:
                model.pop(value, None)
        assert len(table) == len(model)
        assert table.words(hashes_of(list(range(300)))).tolist() == [model.get(value, 0) for value in range(300)]


def test_it_grows_by_dividing_segments_and_loses_nothing() -> None:
    rng = np.random.default_rng(1)
    hashes = np.unique(rng.integers(1, 2**63, 200_000, np.uint64))
    rng.shuffle(hashes)
    table = BlockTable(len(hashes), MULTIPLIER)
    words = np.arange(1, len(hashes) + 1, dtype=np.uint64)
    for at in range(0, len(hashes), 777):
        table.set(table.insert(hashes[at : at + 777]), words[at : at + 777])
    wrong = np.count_nonzero(table.words(hashes) != words)
    assert table.dropped == 0
    assert wrong <= 2  # two hashes that agree in the mark and a row are taken for one
    assert table.bytes_used <= 32 * len(hashes)
    absent = rng.integers(2**63, 2**64 - 1, 100_000, np.uint64)
    assert np.count_nonzero(table.words(absent)) <= 10


def test_it_is_bounded_and_counts_what_it_drops() -> None:
    table = BlockTable(2 * SEGMENT, MULTIPLIER)
    hashes = np.random.default_rng(2).integers(1, 2**63, 40 * SEGMENT, np.uint64)
    placed = 0
    for at in range(0, len(hashes), 1000):
        places = table.insert(hashes[at : at + 1000])
        table.set(places[places >= 0], np.ones((places >= 0).sum(), np.uint64))
        placed += int((places >= 0).sum())
    assert table.dropped == len(hashes) - placed > 0
    assert table.bytes_used <= 5 * SEGMENT * BYTES_PER_PLACE
    assert len(table) >= 2 * SEGMENT


@pytest.mark.parametrize("multiplier", [1, 3, MULTIPLIER])
def test_hashes_that_meet_in_one_row_do_not_stop_it(multiplier: int) -> None:
    """If many hashes fall into one row of the table, those that do not fit are dropped and counted. A caller that knew
    the multiplier could choose such hashes."""
    inverse = pow(multiplier | 1, -1, 1 << 64)
    keys = [(number << 32 | 5 << 14) * inverse & (1 << 64) - 1 for number in range(3, 2003, 2)]
    table = BlockTable(100_000, multiplier)
    places = table.insert(np.array(keys, np.uint64))
    assert (places >= 0).sum() + table.dropped == len(keys)


def test_a_sweep_visits_every_entry_once() -> None:
    hashes = np.random.default_rng(3).integers(1, 2**63, 5000, np.uint64)
    table = BlockTable(len(hashes), MULTIPLIER)
    table.set(table.insert(hashes), np.ones(len(hashes), np.uint64))
    seen: list[int] = []
    segment, more = 0, True
    while more:
        places, more = table.sweep(segment)
        seen += places.tolist()
        segment += 1
    assert sorted(seen) == sorted(table.find(hashes).tolist())


def test_a_first_entry_makes_the_kernel_clear_no_large_page() -> None:
    """The first entry of a large table takes no page of 2 MiB. The kernel clears such a page while the writer waits."""

    def large_pages() -> str:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(line for line in lines if line.startswith("AnonHugePages:"))

    table = BlockTable(10_000_000, MULTIPLIER)
    before = large_pages()
    assert (table.insert(hashes_of([1])) >= 0).all()
    assert large_pages() == before
