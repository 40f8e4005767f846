"""Cache index: which worker holds which KV block, and how much of a prompt each worker holds.

Problem. A worker that holds the beginning of a prompt need not compute it. A gateway learns from the workers' KV events
which blocks they hold, for up to a thousand workers and ten million pairs of block and worker.

Invariants. A wrong or missing entry costs a cache miss and nothing else. Memory is bounded by `max_hashes`. A worker
that has left matches nothing from that moment; its entries are removed later, one segment at a time. Blocks that a
worker is computing are recorded as expected. An expected block matches like a held block. It is dropped when it
expires, if no event of the worker has confirmed it.

All times are monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from cluster.policy.kv_cache.block_table import BlockTable
from cluster.policy.kv_cache.expectations import ExpectedBlocks
from cluster.policy.kv_cache.holder_sets import MAX_WORKER, HolderSets, Words
from cluster.policy.kv_cache.prefix_hashes import Hashes

_SHORT: Final = 512
"""Largest number of blocks of a short prompt. All blocks of a short prompt are looked up, but only some blocks of a
longer prompt."""
_STRIDE: Final = 16
_EXPIRED_AT_ONCE: Final = 512
"""Largest number of prompts whose expected blocks one call of `maintain` drops, in about two milliseconds."""
_BATCH: Final = 1024
"""Largest number of hashes whose entries are changed at once."""


class CacheIndex:
    """The KV blocks that one model's workers hold."""

    def __init__(self, max_hashes: int, multiplier: int) -> None:
        """Create an empty index. `max_hashes`: bound on the number of different blocks. `multiplier`: random number in
        [0, 2**64) that hashes are multiplied by, so that no caller can choose hashes that collide."""
        self._table = BlockTable(max_hashes, multiplier)
        self._sets = HolderSets()
        self._numbers: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._live = 0
        self._departed = 0
        self._next_segment: int | None = None
        self._leaving = 0
        self._expected = ExpectedBlocks()

    def __len__(self) -> int:
        """Number of different blocks."""
        return len(self._table)

    @property
    def workers(self) -> int:
        """Number of workers."""
        return len(self._numbers)

    @property
    def bytes_used(self) -> int:
        """Approximate size of the index in bytes."""
        return self._table.bytes_used + 400 * len(self._sets)

    @property
    def dropped(self) -> int:
        """Number of blocks that were not recorded because the index was full."""
        return self._table.dropped

    def add_worker(self, worker_id: str) -> None:
        """Add a worker that holds nothing yet. If the worker is known already, all of its blocks are forgotten. Raises
        OverflowError if all worker numbers are in use."""
        self.remove_worker(worker_id)
        taken = self._live | self._departed | self._leaving | 1
        for number in self._expected.workers:  # expectations of a departed worker must not end those of this one
            taken |= 1 << number
        number = (~taken & (taken + 1)).bit_length() - 1
        if number > MAX_WORKER:
            raise OverflowError(f"the cache index has room for {MAX_WORKER} workers")
        self._numbers[worker_id] = number
        self._names[number] = worker_id
        self._live |= 1 << number

    def remove_worker(self, worker_id: str) -> None:
        """Forget a worker and all of its blocks. Unknown workers are ignored."""
        number = self._numbers.pop(worker_id, None)
        if number is None:
            return
        del self._names[number]
        self._live &= ~(1 << number)
        self._departed |= 1 << number

    def store(self, worker_id: str, hashes: Hashes) -> None:
        """Record that a worker holds blocks. Unknown workers are ignored."""
        number = self._numbers.get(worker_id)
        if number is not None:
            self._add(number, hashes, expected=False)

    def remove(self, worker_id: str, hashes: Hashes) -> None:
        """Record that a worker no longer holds these blocks. Unknown workers and blocks are ignored."""
        number = self._numbers.get(worker_id)
        if number is not None:
            self._remove(number, hashes, only_expected=False)

    def expect(self, worker_id: str, hashes: Hashes, until: float) -> None:
        """Record that a worker will soon hold the first blocks of a prompt. At the time `until`, the blocks that the
        worker has not reported are forgotten. `until` must not decrease from call to call."""
        number = self._numbers.get(worker_id)
        if number is not None and len(hashes):
            self._add(number, hashes, expected=True)
            self._expected.add(number, hashes, until)

    def match(self, hashes: Hashes) -> Mapping[str, int]:
        """Return how many leading blocks of a prompt each worker holds or is expected to hold, in ascending order of
        these numbers. Workers without the first block are left out. `hashes`: the prefix hashes of the prompt."""
        out: dict[str, int] = {}
        alive = self._live
        starts, words, end = self._runs(hashes)
        for start, word in zip(starts, words, strict=True):
            still = alive & self._sets.holders(word)
            if start and still != alive:
                self._record(out, alive & ~still, start)
            alive = still
            if not alive:
                return out
        if end:
            self._record(out, alive, end)
        return out

    def maintain(self, now: float, segments: int = 1) -> bool:
        """Drop expired expectations, and remove departed workers from up to `segments` segments of the table. Returns
        whether there is more to do now."""
        for worker, hashes in self._expected.pop_due(now, _EXPIRED_AT_ONCE).items():
            # Equal prompts that expire together return the same blocks. The table takes each block once.
            self._remove(worker, np.unique(np.concatenate(hashes)), only_expected=True)
        for _ in range(segments):
            self._sweep()
        return self._expected.is_due(now) or self._next_segment is not None or bool(self._departed)

    def _runs(self, hashes: Hashes) -> tuple[list[int], list[int], int]:
        """Divide the leading blocks of a prompt into runs: consecutive blocks that are held by the same workers. The
        first block that no worker holds ends the last run.

        Returns the index of the first block of each run, the word of each run (the set of its workers), and the number
        of blocks in all runs.
        """
        if len(hashes) <= _SHORT:
            words = self._table.leading_words(hashes)
            if not len(words):
                return [], [], 0
            starts = (words[1:] != words[:-1]).nonzero()[0] + 1
            return [0, *starts.tolist()], [int(words[0]), *words[starts].tolist()], len(words)
        positions, words = self._sampled(hashes)
        changes = (words[1:] != words[:-1]).nonzero()[0] + 1
        starts, kinds = [0, *positions[changes].tolist()], [int(words[0]), *words[changes].tolist()]
        if 0 not in kinds:
            return starts, kinds, len(hashes)
        first = kinds.index(0)
        return starts[:first], kinds[:first], starts[first]

    def _sampled(self, hashes: Hashes) -> tuple[npt.NDArray[np.int64], Words]:
        """Look up some blocks of a long prompt. Returns the positions of the blocks that were looked up, and a word
        for each of them. The word encodes the set of workers that hold the block; it is 0 for no worker. Every
        other block has the same word as the nearest block before it that was looked up.

        First, every 16th block is looked up, up to the first one that no worker holds. Where two consecutive
        results differ, all blocks between them are looked up too. Where they are equal, the blocks between them
        have the same word, since an engine evicts the last blocks of a prefix first.
        """
        count = len(hashes)
        coarse = np.append(np.arange(0, count - 1, _STRIDE), count - 1)
        words = self._table.leading_words(hashes[coarse])
        if len(words) < len(coarse):
            coarse, words = coarse[: len(words) + 1], np.append(words, np.uint64(0))
        gaps = (words[1:] != words[:-1]).nonzero()[0]
        between = (coarse[gaps][:, None] + np.arange(1, _STRIDE)).reshape(-1)
        between = between[between < np.repeat(coarse[gaps + 1], _STRIDE - 1)]
        positions = np.concatenate((coarse, between))
        order = positions.argsort()
        return positions[order], np.concatenate((words, self._table.words(hashes[between])))[order]

    def _record(self, out: dict[str, int], workers: int, blocks: int) -> None:
        while workers:
            bit = workers & -workers
            out[self._names[bit.bit_length() - 1]] = blocks
            workers ^= bit

    def _add(self, number: int, hashes: Hashes, expected: bool) -> None:
        for at in range(0, len(hashes), _BATCH):
            batch = hashes[at : at + _BATCH]
            places = self._table.insert(batch)
            if (places < 0).any():
                places = places[places >= 0]
            self._table.set(places, self._sets.add(self._table.get(places), number, expected))

    def _remove(self, number: int, hashes: Hashes, only_expected: bool) -> None:
        for at in range(0, len(hashes), _BATCH):
            places = self._table.find(hashes[at : at + _BATCH])
            places = places[places >= 0]
            self._table.set(places, self._sets.remove(self._table.get(places), number, only_expected))

    def _sweep(self) -> None:
        """Remove departed workers from the next segment of the table. After the removal from all segments, the numbers
        of these workers can be given to new workers."""
        if self._next_segment is None:
            if not self._departed:
                return
            self._leaving, self._departed, self._next_segment = self._departed, 0, 0
        places, more = self._table.sweep(self._next_segment)
        self._table.set(places, self._sets.keep(self._table.get(places), ~self._leaving))
        if more:
            self._next_segment += 1
        else:
            self._next_segment, self._leaving = None, 0
