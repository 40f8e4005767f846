"""Finds and ends all processes of one local cluster, and no other processes.

This is the last step of a stop, after Ray's own shutdown. A process belongs to the cluster in two cases. First, its
environment contains HEADRACE_INSTANCE=<id>, which child processes inherit. Second, its standard output or error is a
file below the cluster's run folder. The second case finds vLLM's engine core and ranks: they rename themselves, which
can overwrite the environment that /proc shows, but their output still goes to Ray's log files. A process that only
reads these files, such as `tail`, does not belong to the cluster.

A killed engine process leaves its shared memory behind, so the shared-memory blocks of the ended processes are removed
too.
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
    """Return the ids of the cluster's living processes except the calling process. Without /proc, the set is empty.
    `instance`: the cluster's id in the environment of its processes. `folder`: the cluster's folder, to which processes
    write their output."""
    tag = f"{INSTANCE_ENV}={instance}".encode()
    below = f"{folder.resolve()}/" if folder is not None else ""
    own = os.getpid()
    pids = set()
    for entry in os.scandir("/proc") if os.path.isdir("/proc") else ():
        if entry.name.isdigit() and int(entry.name) != own and _belongs(Path(entry.path), tag, below):
            pids.add(int(entry.name))
    return frozenset(pids)


def _belongs(process: Path, tag: bytes, below: str) -> bool:
    try:
        if _is_zombie(process):
            return False
        if tag in (process / "environ").read_bytes().split(b"\0"):
            return True
        return bool(below) and any(_target(process / "fd" / number).startswith(below) for number in ("1", "2"))
    except OSError:  # the process has ended, or belongs to another user
        return False


def _is_zombie(process: Path) -> bool:
    return (process / "stat").read_bytes().rpartition(b")")[2].split()[0] in (b"Z", b"X")


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def end(instance: str, folder: Path | None = None, *, keep: Iterable[int] = (), grace_s: float = 1.0) -> int:
    """End every process of the cluster except `keep`. Returns the number of processes that were found.

    Each process gets SIGTERM and, if it still runs after `grace_s` seconds, SIGKILL. The search and the signals are
    repeated until no process is left, but at most until 5 s after the first SIGKILL. So processes that start in the
    meantime end too. Then the shared memory, semaphores and socket folders of the ended engines are removed.
    """
    exempt = frozenset(keep)
    seen: set[int] = set()
    blocks: set[str] = set()
    kill_at = time.monotonic() + grace_s
    give_up_at = kill_at + 5.0
    while (pids := find(instance, folder) - exempt) and time.monotonic() < give_up_at:
        kill_now = time.monotonic() >= kill_at
        # before any kill, since the first kill can end other processes too
        blocks = blocks.union(*map(watchdog.mapped_shared_memory, pids), watchdog.semaphores(pids))
        for pid in pids:
            if kill_now or pid not in seen:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL if kill_now else signal.SIGTERM)
        seen |= pids
        time.sleep(_POLL_S)
    watchdog.unlink(blocks - watchdog.semaphores({os.getpid(), *exempt}))
    sockets.sweep()
    return len(seen)
