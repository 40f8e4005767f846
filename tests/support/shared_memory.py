"""Blocks of shared memory of the engines on this machine. Engines of other tests may run here too."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from cluster.worker.engine.processes import watchdog


def blocks() -> set[str]:
    """Return the names of the blocks of shared memory that may belong to an engine."""
    return {path.name for path in Path("/dev/shm").iterdir() if watchdog.SHARED_MEMORY.fullmatch(path.name)}


def left_blocks(before: set[str]) -> set[str]:
    """Return the names of new blocks (not in `before`) that no process has mapped. Nothing will remove them."""
    left = blocks() - before
    for maps in Path("/proc").glob("[0-9]*/maps") if left else ():
        with suppress(OSError):  # the process has ended, or is another user's
            left -= watchdog.shared_memory_files(maps.read_text())
    return left & blocks()


def named_blocks(pid: int) -> set[str]:
    """Return the names of the blocks that a process has mapped and that are still in /dev/shm."""
    return watchdog.shared_memory_files(Path(f"/proc/{pid}/maps").read_text())
