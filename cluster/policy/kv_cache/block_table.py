"""A hash table from prefix hashes to 64-bit words, for millions of hashes, with operations on whole arrays.

Problem. A Python dict takes over a hundred bytes for each hash and one step of the interpreter for each access, and it
stops the process while it grows.

Method. The table has segments of 1024 rows with eight places each. The top bits of a hash choose the segment by a
directory, other bits choose one of two rows (partial-key cuckoo hashing, Fan et al., "Cuckoo Filter", 2014, without
moves). A place holds 32 bits of the hash. A full segment is divided in two by the next bit of the hash (extendible
hashing, Fagin et al., 1979): all entries keep their rows, so this takes some ten microseconds, and the table never
grows as a whole. Hashes are multiplied by a random odd number first, so that nobody can choose hashes that meet in one
row.

Two hashes are taken for one if they agree in 32 bits and one of their rows: for a random hash that is not in the table
with a probability below 1 in 100,000. Users must bear that, as cache routing does.
"""

from __future__ import annotations

import sys
from typing import Final

import numpy as np
import numpy.typing as npt

from cluster.policy.kv_cache.holder_sets import Words
from cluster.policy.kv_cache.prefix_hashes import Hashes

Places = npt.NDArray[np.int64]
"""Positions in the arrays of all places; -1 for a hash that is not in the table."""

ROWS, WIDTH = 256, 8
SEGMENT: Final = ROWS * WIDTH
BYTES_PER_PLACE: Final = 12
_MAX_DEPTH: Final = 20
_OWNERS: Final = 1 << 15
_FULL: Final = int(SEGMENT * 0.85)
"""Number of entries from which a segment is divided."""
_ROW_SHIFT: Final = np.uint64(14)
_HIGH_HALF: Final = 1 if sys.byteorder == "little" else 0
_ONE_MARK: Final = np.uint32(1)
_MIX, _MIX_SHIFT = np.uint32(0x9E3779B1), np.uint32(24)
_EXPONENT_0: Final = 1023 << 52


class BlockTable:
    """A table from hashes to words that are not 0. At most `max_hashes` entries, rounded up to whole segments."""

    def __init__(self, max_hashes: int, multiplier: int) -> None:
        """`multiplier`: random number in [0, 2**64)."""
        self._multiplier = np.uint64(multiplier | 1)
        most = max(-(-max_hashes * 2 // SEGMENT), 2)
        # Zero pages that are never written take no memory, so only used segments do.
        self._marks = np.zeros((most * ROWS, WIDTH), np.uint32)
        self._words = np.zeros((most, SEGMENT), np.uint64)
        self._flat_marks, self._flat_words = self._marks.reshape(-1), self._words.reshape(-1)
        self._most = most
        self._depth = 1
        self._directory = np.zeros(2, np.int64)
        """First row of the segment, by the top `_depth` bits of a hash."""
        self._depths = [0]
        """Number of top bits that the hashes of a segment share."""
        self._counts = np.zeros(most, np.int64)
        self._owners = np.zeros(_OWNERS, np.int64)
        self.dropped = 0
        """Number of entries that found no place."""

    def __len__(self) -> int:
        return int(self._counts.sum())

    @property
    def bytes_used(self) -> int:
        """Number of bytes of the used segments and the directory."""
        return len(self._depths) * SEGMENT * BYTES_PER_PLACE + self._directory.nbytes

    def find(self, hashes: Hashes) -> Places:
        """Return the place of each hash."""
        return self._find(*self._keys(hashes))

    def words(self, hashes: Hashes) -> Words:
        """Return the word of each hash; 0 for a hash that is not in the table."""
        places = self.find(hashes)
        words = self._flat_words.take(places, mode="clip")
        words *= places >= 0
        return words

    def get(self, places: Places) -> Words:
        """Return the words at places that `find` or `insert` has returned for hashes in the table."""
        return self._flat_words[places]

    def set(self, places: Places, words: Words) -> None:
        """Set the words at places. A place whose word becomes 0 is free."""
        self._flat_words[places] = words
        empty = places[words == 0]
        if empty.size:
            self._flat_marks[empty] = 0
            self._count(empty, -1)

    def insert(self, hashes: Hashes) -> Places:
        """Return the place of each hash, after adding the missing ones with the word 0, which the caller must set. The
        hashes are distinct. -1 for a hash for which there is no place."""
        while True:
            marks, rows = self._keys(hashes)
            places = self._find(marks, rows)
            missing = (places < 0).nonzero()[0]
            if not missing.size:
                return places
            places[missing] = self._claim(rows[:, missing], marks[missing])
            missing = missing[places[missing] < 0]
            crowded = {*(rows[0, missing] // ROWS).tolist(), *(self._counts > _FULL).nonzero()[0].tolist()}
            if sum([self._divide(segment) for segment in crowded]) == 0:
                self.dropped += missing.size
                return places

    def sweep(self, segment: int) -> tuple[Places, bool]:
        """Return the used places of one segment, and whether there are further segments. Segments are numbered from
        0."""
        at = segment * ROWS
        used = np.flatnonzero(self._marks[at : at + ROWS].reshape(-1)) + segment * SEGMENT
        return used, segment + 1 < len(self._depths)

    def _keys(self, hashes: Hashes) -> tuple[npt.NDArray[np.uint32], Places]:
        """Return each hash's mark, and the two rows of each hash as an array of shape (2, hashes)."""
        keys = hashes * self._multiplier
        marks = keys.view(np.uint32)[_HIGH_HALF::2] | _ONE_MARK
        rows = np.empty((2, len(hashes)), np.int64)
        rows[0] = keys >> _ROW_SHIFT
        rows[0] &= ROWS - 1
        rows[0] += self._directory.take(marks >> np.uint32(32 - self._depth))
        np.bitwise_xor(rows[0], (marks * _MIX) >> _MIX_SHIFT | _ONE_MARK, out=rows[1])
        return marks, rows

    def _find(self, marks: npt.NDArray[np.uint32], rows: Places) -> Places:
        columns = _first_true(self._marks.take(rows, axis=0) == marks[:, None])
        places: Places = np.where(columns < 0, -1, rows * WIDTH + columns)
        best: Places = np.maximum(places[0], places[1])
        return best

    def _claim(self, rows: Places, marks: npt.NDArray[np.uint32]) -> Places:
        """Write each mark into a free place of the emptier of its two rows. Returns the places; -1 for a mark whose
        rows are full."""
        places = np.full(len(marks), -1, np.int64)
        left = np.arange(len(marks))
        while left.size:
            free = self._marks.take(rows[:, left], axis=0) == 0
            room = free.sum(axis=2)
            better = (room[1] > room[0]).astype(np.int64)
            at = np.arange(len(left))
            wanted = rows[better, left] * WIDTH + _first_true(free[better, at])
            has_room = room[better, at] > 0
            left, wanted = left[has_room], wanted[has_room]
            # Of several marks for one place, the last one that is written gets it. The others try the next place.
            self._owners[wanted % _OWNERS] = left
            won = self._owners[wanted % _OWNERS] == left
            taken = wanted[won]
            self._flat_marks[taken] = marks[left[won]]
            places[left[won]] = taken
            self._count(taken, 1)
            left = left[~won]
        return places

    def _count(self, places: Places, by: int) -> None:
        """Count places that have been filled (1) or freed (-1)."""
        np.add.at(self._counts, places // SEGMENT, by)

    def _divide(self, segment: int) -> bool:
        """Divide a segment in two. Returns False if the table may not grow any more."""
        depth, new = self._depths[segment], len(self._depths)
        if new == self._most or depth == _MAX_DEPTH:
            return False
        if depth == self._depth:
            self._directory = np.repeat(self._directory, 2)
            self._depth += 1
        rows, new_rows = slice(segment * ROWS, (segment + 1) * ROWS), slice(new * ROWS, (new + 1) * ROWS)
        moved = (self._marks[rows] >> np.uint32(31 - depth)) & _ONE_MARK == 1
        self._marks[new_rows] = np.where(moved, self._marks[rows], 0)
        self._words[new] = np.where(moved.reshape(-1), self._words[segment], 0)
        self._marks[rows] *= ~moved
        self._words[segment] *= ~moved.reshape(-1)
        self._depths[segment] = depth + 1
        self._depths.append(depth + 1)
        self._counts[new] = np.count_nonzero(self._marks[new_rows])
        self._counts[segment] -= self._counts[new]
        mine = (self._directory == segment * ROWS).nonzero()[0]
        self._directory[mine[(mine >> (self._depth - depth - 1)) & 1 == 1]] = new * ROWS
        return True


def _first_true(values: npt.NDArray[np.bool_]) -> Places:
    """Return the column of the first true value in each row of eight values, which is the last axis; negative for a row
    without one."""
    # Eight truth values are one number. As a float, its lowest bit has eight times the column as exponent.
    bits = values.view(np.int64)[..., 0]
    return ((bits & -bits).astype(np.float64).view(np.int64) - _EXPONENT_0) >> 55
