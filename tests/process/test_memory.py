"""Free memory is returned to the system at idle moments."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from cluster.process import memory
from tests.support.cluster import until

PIECE, PIECES = 4_000, 20_000


def resident_bytes() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_holes_in_the_heap_go_back() -> None:
    """`return_free_pages` gives free pages of the heap back to the operating system. The test first frees most of 80 MB
    of small objects, whose pages glibc keeps."""
    pieces = [bytearray(PIECE) for _ in range(PIECES)]
    kept = pieces[::100]
    before = resident_bytes()
    del pieces
    held = resident_bytes()
    assert memory.return_free_pages()
    assert resident_bytes() < held - PIECE * PIECES / 2 or held < before - PIECE * PIECES / 2
    assert len(kept) == PIECES // 100


async def test_it_is_done_when_nobody_calls() -> None:
    """Free memory is returned once at an idle moment, and again after the interval. It is not returned while a call is
    open."""
    given: list[bool] = []
    busy, looks = [True], [0]

    def idle() -> bool:
        looks[0] += 1
        return not busy[0]

    def give() -> bool:
        given.append(busy[0])
        return True

    task = asyncio.create_task(memory.keep_returning_free_pages(idle, every_s=0.02, check_s=0.002, give=give))
    await until(lambda: looks[0] >= 20, "it has checked often")
    assert not given
    busy[0] = False
    await until(lambda: len(given) >= 3, "memory is returned again")
    task.cancel()
    assert not any(given)
