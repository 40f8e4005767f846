"""A hash table from prefix hashes to 64-bit words, for millions of hashes, with operations on whole arrays.

Problem. A Python dict takes over a hundred bytes for each hash and one step of the interpreter for each access, and it
stops the process while it grows.

Method. The table has segments of 256 rows with eight places each. The top bits of a hash choose the segment, through a
directory. Two other bytes choose two rows of the segment, and a new hash goes to the emptier row (Azar et al.,
"Balanced Allocations", 1994). A place holds the mark of a hash, which is the top 32 bits of the hash. The entries of a
full segment are divided over two segments by the next bit of their hashes (extendible hashing, Fagin et al., 1979). An
entry keeps its row number when its segment is divided. So a division takes some ten microseconds, and the table never
grows as a whole. Hashes are multiplied by a random odd number first, so that no caller can choose hashes that fall into
one row.

Two hashes are confused if they have the same mark and a row in common. For a random hash that is not in the table, the
probability is about 1 in 25,000 at ten million entries, and a tenth of that at one million. Users of the table must
tolerate such errors, as cache routing does.

A lookup of some hundred hashes takes time in proportion to the number of numpy calls. So the code looks at both rows of
all hashes at once.
"""

from __future__ import annotations

import mmap
import sys
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cluster.policy.kv_cache.holder_sets import Words
from cluster.policy.kv_cache.prefix_hashes import Hashes

Places = npt.NDArray[np.int64]
"""Positions of places in the flat arrays of the table; -1 for a hash that is not in the table."""

ROWS, WIDTH = 256, 8
SEGMENT: Final = ROWS * WIDTH
BYTES_PER_PLACE: Final = 12
_MAX_DEPTH: Final = 20
_OWNERS: Final = 1 << 15
_FULL: Final = int(SEGMENT * 0.85)
"""A segment with more entries than this number is divided."""
_IS_LITTLE: Final = sys.byteorder == "little"
_HIGH_HALF: Final = 1 if _IS_LITTLE else 0
_ROW_BYTES: Final = slice(2, 4) if _IS_LITTLE else slice(4, 6)
"""The bytes of a hash that choose its rows."""
_ONE_MARK: Final = np.uint32(1)

Marks = npt.NDArray[np.uint32]
_Flags = npt.NDArray[np.uint64]
"""One number for each row, with one byte for each of the eight places: 1 if the place is selected, else 0."""
_BYTE_OF_COLUMN: Final = range(8) if _IS_LITTLE else range(7, -1, -1)
_COLUMNS: Final = np.uint64(sum(column << (61 - 8 * byte) for column, byte in enumerate(_BYTE_OF_COLUMN)))
"""Factor for `_Flags` that select one place of a row: the top three bits of the product are the column of that place.
The product is never 0."""
_COLUMN_SHIFT: Final = np.uint64(61)
_BYTE_SUM, _BYTE_SUM_SHIFT = np.uint64(0x0101010101010101), np.uint64(56)


class BlockTable:
    """Hash table from prefix hashes to 64-bit words other than 0, with room for `max_hashes` entries."""

    def __init__(self, max_hashes: int, multiplier: int) -> None:
        """`multiplier`: random number in [0, 2**64)."""
        self._multiplier = np.uint64(multiplier | 1)
        most = max(-(-max_hashes * 2 // SEGMENT), 2)
        self._marks: Marks = _zeros((most * ROWS, WIDTH), np.uint32)
        self._words: Words = _zeros((most, SEGMENT), np.uint64)
        self._flat_marks, self._flat_words = self._marks.reshape(-1), self._words.reshape(-1)
        self._most = most
        self._depth = 1
        self._directory = np.zeros(2, np.int64)
        """First row of the segment, by the top `_depth` bits of a hash."""
        self._depths = [0]
        """Number of top bits that the hashes of a segment share, by segment."""
        self._counts = np.zeros(most, np.int64)
        self._owners = np.zeros(_OWNERS, np.int64)
        self.dropped = 0
        """Number of hashes that were not inserted because the table was full."""

    def __len__(self) -> int:
        return int(self._counts.sum())

    @property
    def bytes_used(self) -> int:
        """Number of bytes of the used segments and the directory."""
        return len(self._depths) * SEGMENT * BYTES_PER_PLACE + self._directory.nbytes

    def find(self, hashes: Hashes) -> Places:
        """Return the place of each hash; -1 for a hash that is not in the table."""
        return self._find(*self._keys(hashes))

    def words(self, hashes: Hashes) -> Words:
        """Return the 64-bit word that is stored for each hash; 0 for a hash that is not in the table."""
        places, products = self._locate(*self._keys(hashes))
        words = self._flat_words.take(places)
        words *= products != 0
        return words

    def leading_words(self, hashes: Hashes) -> Words:
        """Return the 64-bit words that are stored for the first hashes, up to the first hash that is not in the
        table."""
        places, products = self._locate(*self._keys(hashes))
        if not products.all():
            places = places[: (products == 0).argmax()]
        return self._flat_words.take(places)

    def get(self, places: Places) -> Words:
        """Return the words (bit sets of workers) that are stored at some places. `places`: places that `find` or
        `insert` has returned. The caller must leave out -1, which is no place."""
        return self._flat_words[places]

    def set(self, places: Places, words: Words) -> None:
        """Write words into these places of the table. Writing the word 0 makes a place free."""
        self._flat_words[places] = words
        empty = places[words == 0]
        if empty.size:
            self._flat_marks[empty] = 0
            self._count(empty, -1)

    def insert(self, hashes: Hashes) -> Places:
        """Return the place of each hash; -1 if the table has no room for the hash. For a hash that was not in the
        table, an entry with the value (word) 0 is made, and the caller must set its value. The hashes must be
        distinct."""
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

    def _keys(self, hashes: Hashes) -> tuple[Marks, Places]:
        """Return the mark of each hash, and the two rows of the table where the hash may be. A mark is the part of a
        hash that the table stores. The rows are an array of shape (2, number of hashes)."""
        keys = hashes * self._multiplier
        first_rows = self._directory.take((keys >> np.uint64(64 - self._depth)).view(np.int64))
        rows = first_rows + keys.view(np.uint8).reshape(-1, 8)[:, _ROW_BYTES].T
        return keys.view(np.uint32)[_HIGH_HALF::2] | _ONE_MARK, rows

    def _locate(self, marks: Marks, rows: Places) -> tuple[Places, _Flags]:
        """Look up marks, each of which is a part of a block's hash. A mark can be in one of two rows of the table.
        Returns the place of each mark, and a number for each mark that is 0 if the mark is in neither row. The place is
        meaningless if the number is 0."""
        products = (self._marks.take(rows, axis=0) == marks[:, None]).view(np.uint64)[..., 0]
        products *= _COLUMNS
        places = np.where(products[0], rows[0], rows[1])
        places *= WIDTH
        either: _Flags = products[0] | products[1]  # one of the two is 0, unless both rows are the same
        places += (either >> _COLUMN_SHIFT).view(np.int64)
        return places, either

    def _find(self, marks: Marks, rows: Places) -> Places:
        places, products = self._locate(marks, rows)
        if not products.all():
            places[products == 0] = -1
        return places

    def _claim(self, rows: Places, marks: Marks) -> Places:
        """Write each mark into a free place in the emptier of its two rows. Returns the places; -1 for a mark whose
        rows are full."""
        places = np.full(len(marks), -1, np.int64)
        left = np.arange(len(marks))
        while left.size:
            free = (self._marks.take(rows, axis=0) == 0).view(np.uint64)[..., 0]
            room = (free * _BYTE_SUM) >> _BYTE_SUM_SHIFT
            is_second = room[1] > room[0]
            flags = np.where(is_second, free[1], free[0])
            wanted = np.where(is_second, rows[1], rows[0]) * WIDTH
            wanted += (((flags & -flags) * _COLUMNS) >> _COLUMN_SHIFT).view(np.int64)
            if not flags.all():
                has_room = flags.nonzero()[0]
                left, wanted, rows = left[has_room], wanted[has_room], rows[:, has_room]
            # Of several marks for one place, the last one that is written gets it. The others try the next place.
            owners = wanted % _OWNERS
            self._owners[owners] = left
            won = self._owners[owners] == left
            taken, winners = wanted[won], left[won]
            self._flat_marks[taken] = marks[winners]
            places[winners] = taken
            self._count(taken, 1)
            if len(winners) == len(left):
                break
            left, rows = left[~won], rows[:, ~won]
        return places

    def _count(self, places: Places, by: int) -> None:
        """Update the number of used places of the segments. `places`: the changed places. `by`: 1 if they were filled,
        -1 if they were freed."""
        np.add.at(self._counts, places // SEGMENT, by)

    def _divide(self, segment: int) -> bool:
        """Divide a segment in two. Returns False if the table cannot grow further."""
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


def _zeros(shape: tuple[int, int], kind: type[np.uint32 | np.uint64]) -> npt.NDArray[Any]:
    """Return an array of zeros in a memory mapping of its own. The mapping begins at a page, so no row of the array
    crosses a line of the processor's cache. Pages that are never written use no memory.

    numpy would request pages of 2 MiB. The kernel clears such a page when it is first written, which stalls the event
    loop for up to ten milliseconds.
    """
    size = shape[0] * shape[1] * np.dtype(kind).itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, kind).reshape(shape)
