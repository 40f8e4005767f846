"""Sets of workers as 64-bit words, so that one array gives the workers of many KV blocks.

Most blocks are held by few workers. The word of a set of up to four workers has four fields of 16 bits: 15 bits for a
worker's number, and one bit that is 1 if the worker is only expected to hold the block soon.

A larger set is stored in a table. Its word is the number of its table entry, with the top bit set. The table stays
small, since all blocks of a shared prompt are held by the same workers. The number of an entry is reused once no block
has the set of this entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

MAX_WORKER: Final = (1 << 14) - 1
"""Largest worker number. The smallest is 1."""
_IN_TABLE: Final = 1 << 63
_FIELDS: Final = 4
_FIELD: Final = 0xFFFF

Members = tuple[int, int]
"""Two bit masks: the workers that hold a block, and the workers that are expected to hold it. No worker is in both."""


def members_of_word(word: int) -> Members:
    """Return the workers in the four fields of a word. The word must not be the number of a table entry, that is, its
    top bit must not be set."""
    held = expected = 0
    while word:
        field = word & _FIELD
        if field & 1:
            expected |= 1 << (field >> 1)
        else:
            held |= 1 << (field >> 1)
        word >>= 16
    return held, expected


class HolderSets:
    """A table of those sets of workers that have more than four workers. The methods also handle smaller sets, and can
    change the sets of many KV blocks at once."""

    def __init__(self) -> None:
        self._sets: list[Members] = []
        self._uses: list[int] = []
        self._numbers: dict[Members, int] = {}
        self._unused: list[int] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def members(self, word: int) -> Members:
        """Return the workers of the set that is encoded as `word`."""
        return self._sets[word - _IN_TABLE] if word >= _IN_TABLE else members_of_word(word)

    def holders(self, word: int) -> int:
        """Return the bit mask of all workers of the set that is encoded as `word`, including the expected holders."""
        held, expected = self.members(word)
        return held | expected

    def add(self, words: Words, worker: int, expected: bool = False) -> Words:
        """Add a worker to the sets `words` and return the changed sets. With `expected`, the worker is only expected to
        hold the blocks soon; without, it holds them. A worker that already holds a block stays its holder."""
        bit = 1 << worker

        def added(members: Members) -> Members:
            held, awaited = members
            if expected:
                return (held, awaited) if held & bit else (held, awaited | bit)
            return held | bit, awaited & ~bit

        return self._changed(words, added)

    def remove(self, words: Words, worker: int, only_expected: bool = False) -> Words:
        """Remove a worker from sets of workers, and return the changed sets. `only_expected`: remove the worker only
        where it is an expected holder."""
        bit = 1 << worker

        def removed(members: Members) -> Members:
            held, awaited = members
            return (held if only_expected else held & ~bit), awaited & ~bit

        return self._changed(words, removed)

    def keep(self, words: Words, workers: int) -> Words:
        """Return the sets without the workers that are not in the bit mask `workers`."""
        return self._changed(words, lambda members: (members[0] & workers, members[1] & workers))

    def _changed(self, words: Words, change: Callable[[Members], Members]) -> Words:
        """Apply `change` to the worker set of each KV block in a batch, and return the new words. The blocks of a batch
        mostly share a few sets, so each distinct set is changed only once."""
        if len(words) and (words == words[0]).all():
            return np.full(len(words), self._change(int(words[0]), len(words), change), np.uint64)
        old, positions, counts = np.unique(words, return_inverse=True, return_counts=True)
        new = [self._change(word, count, change) for word, count in zip(old.tolist(), counts.tolist(), strict=True)]
        return np.array(new, np.uint64)[positions]

    def _change(self, word: int, count: int, change: Callable[[Members], Members]) -> int:
        """Apply `change` to the set that is encoded as `word`, for `count` blocks that have this set. Returns the word
        of the new set."""
        before = self.members(word)
        after = change(before)
        if after == before:
            return word
        new = self._word(after, count)
        self._release(word, count)
        return new

    def _word(self, members: Members, count: int) -> int:
        held, expected = members
        if (held | expected).bit_count() <= _FIELDS:
            return _packed(held, expected)
        number = self._numbers.get(members)
        if number is None:
            number = self._unused.pop() if self._unused else len(self._sets)
            if number == len(self._sets):
                self._sets.append(members)
                self._uses.append(0)
            self._sets[number] = members
            self._numbers[members] = number
        self._uses[number] += count
        return _IN_TABLE + number

    def _release(self, word: int, count: int) -> None:
        if word < _IN_TABLE:
            return
        number = word - _IN_TABLE
        self._uses[number] -= count
        if not self._uses[number]:
            del self._numbers[self._sets[number]]
            self._sets[number] = (0, 0)
            self._unused.append(number)


def _packed(held: int, expected: int) -> int:
    word, at, both = 0, 0, held | expected
    while both:
        bit = both & -both
        field = (bit.bit_length() - 1) << 1 | (1 if expected & bit else 0)
        word |= field << at
        at += 16
        both ^= bit
    return word
