"""What is free goes back to the system."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.observe import garbage

PIECE, PIECES = 4_000, 20_000


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_holes_in_the_heap_go_back() -> None:
    """Of 80 MB all but every hundredth piece is freed: glibc keeps them for itself, until it is asked."""
    pieces = [bytearray(PIECE) for _ in range(PIECES)]
    kept = pieces[::100]
    before = resident_bytes()
    del pieces
    held = resident_bytes()
    assert garbage.give_back()
    assert resident_bytes() < held - PIECE * PIECES / 2 or held < before - PIECE * PIECES / 2
    assert len(kept) == PIECES // 100
