"""Finds and ends every process of one local cluster, and no other: the last step of a stop, when Ray has done its own.

A process belongs to the cluster when its environment holds HEADRACE_INSTANCE=<id>, which every child inherits, or
when it has a file open below the cluster's run folder. The second rule is there because a process that renames itself
(vLLM's engine core and ranks do) can overwrite what /proc shows of its environment; their output still goes to Ray's
log files.

Whoever is killed leaves the shared memory of its engine, so what they have mapped is taken away with them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from cluster.worker.engine.processes import sockets, watchdog

INSTANCE_ENV = "HEADRACE_INSTANCE"
_POLL_S = 0.05


def find(instance: str, folder: Path | None = None) -> frozenset[int]:
    """Pids of the cluster's living processes, this one left out. Without /proc there are none."""
    tag = f"{INSTANCE_ENV}={instance}".encode()
    below = f"{folder.resolve()}/" if folder is not None else ""
    own = os.getpid()
    found = set()
    for entry in os.scandir("/proc") if os.path.isdir("/proc") else ():
        if entry.name.isdigit() and int(entry.name) != own and _belongs(Path(entry.path), tag, below):
            found.add(int(entry.name))
    return frozenset(found)


def _belongs(process: Path, tag: bytes, below: str) -> bool:
    try:
        if _is_zombie(process):
            return False
        if tag in (process / "environ").read_bytes().split(b"\0"):
            return True
        return bool(below) and any(_target(link).startswith(below) for link in os.scandir(process / "fd"))
    except OSError:  # gone meanwhile, or another user's
        return False


def _is_zombie(process: Path) -> bool:
    return (process / "stat").read_bytes().rpartition(b")")[2].split()[0] in (b"Z", b"X")


def _target(link: os.DirEntry[str]) -> str:
    try:
        return os.readlink(link.path)
    except OSError:
        return ""


def end(instance: str, folder: Path | None = None, *, keep: Iterable[int] = (), grace_s: float = 1.0) -> int:
    """SIGTERM to each process of the cluster but `keep`, SIGKILL after `grace_s`; returns how many there were.

    Looks again until none is left, so that what was started meanwhile ends too. Then takes their engines' shared memory
    and folders of sockets away.
    """
    kept = frozenset(keep)
    seen: set[int] = set()
    blocks: set[str] = set()
    kill_at = time.monotonic() + grace_s
    give_up_at = kill_at + 5.0
    while (pids := find(instance, folder) - kept) and time.monotonic() < give_up_at:
        hard = time.monotonic() >= kill_at
        blocks = blocks.union(*map(watchdog.blocks_of, pids))  # of all first: some end with the first that is killed
        for pid in pids:
            if hard or pid not in seen:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL if hard else signal.SIGTERM)
        seen |= pids
        time.sleep(_POLL_S)
    watchdog.unlink(blocks)
    sockets.sweep()
    return len(seen)
