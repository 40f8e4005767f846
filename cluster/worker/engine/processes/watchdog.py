"""No orphans: every process of an engine ends itself soon after the process that owns the engine is gone.

vLLM's engine core outlives a killed parent (and spins), its ranks keep their memory. A process cannot be told to
watch from outside, so the owner leaves a mark in the environment, which its children inherit, and a vLLM plugin
(entry point group vllm.general_plugins, loaded in every vLLM process) starts a thread that watches the owner. The
mark names the owner by pid, start time, boot and pid namespace: a pid alone is reused, and means nothing on the other
nodes to which Ray carries the environment. There the thread is not started, and the ranks end as Ray actors whose
owner has died.

What ends so suddenly leaves its shared memory, and all of an engine may end in one moment, so that nobody outlives the
others. Its names are therefore taken away as soon as the engine is up: all have it mapped then, and it goes with the
last of them. What ends while it starts still has names: core and ranks take them away as they end, and so does whoever
ends them all (reaper.py).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Set
from pathlib import Path

import psutil

from cluster.worker.engine.processes import end_causes, sockets

MARK = "HEADRACE_WATCHDOG_PID"
POLL_S = 0.5
SHARED_MEMORY = re.compile(r"psm_\w+|.+-cpushm(-[\w-]+)?_\d+")
"""Names of an engine's blocks under /dev/shm: multiprocessing's, and those of vLLM's communicator for CPU ranks."""

_started = threading.Event()


def _start_time(pid: int) -> str:
    """Start time of a process in clock ticks since boot; empty when it is gone or only waits to be reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _here() -> str:
    """This kernel and this pid namespace: where a pid has its meaning."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def mark(pid: int) -> str:
    """The name of a process that no other process ever has; empty where /proc is not there."""
    start, here = _start_time(pid), _here()
    return f"{pid}@{start}@{here}" if start and here else ""


def arm() -> None:
    """Make this process the one that the children started from now on watch."""
    own = mark(os.getpid())
    if own:
        os.environ[MARK] = own


def alive(owner: str) -> bool | None:
    """Whether the marked process lives; None when the mark says nothing here."""
    pid, _, rest = owner.partition("@")
    start, _, here = rest.partition("@")
    if not pid.isdigit() or not start or here != _here():
        return None
    return _start_time(int(pid)) == start


def shared_memory_files(maps: str) -> set[str]:
    """The names of an engine's blocks in the text of /proc/<pid>/maps."""
    found = set()
    for line in maps.splitlines():
        path = line.partition("/dev/shm/")[2]  # noqa: S108
        if SHARED_MEMORY.fullmatch(path):  # what is unlinked already ends with " (deleted)"
            found.add(path)
    return found


def blocks_of(pid: int | str) -> set[str]:
    """The blocks that a process has mapped; none once it has ended."""
    try:
        return shared_memory_files(Path(f"/proc/{pid}/maps").read_text())
    except OSError:  # it has ended, or is not ours to read
        return set()


def children() -> set[int]:
    """The processes that this one has started."""
    return {child.pid for child in psutil.Process().children()}


def _with_descendants(roots: Iterable[int]) -> set[int]:
    found: set[int] = set()
    for pid in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {pid, *(one.pid for one in psutil.Process(pid).children(recursive=True))}
    return found


def sharers(names: set[str]) -> dict[int, set[str]]:
    """The processes on this host that have one of these blocks mapped, with all that they have: ranks that Ray has
    placed are not descendants of anybody here, and end too suddenly to take their blocks along."""
    pids = [int(process.name) for process in Path("/proc").iterdir() if process.name.isdigit()] if names else []
    return {pid: theirs for pid in pids if (theirs := blocks_of(pid)) & names}


def unlink(names: Iterable[str]) -> None:
    """Take blocks away. Whoever has one mapped keeps it until it ends."""
    for name in names:
        try:
            os.unlink(f"/dev/shm/{name}")  # noqa: S108
        except OSError:
            continue  # a sibling was first


def own_processes(others: Set[int]) -> set[int]:
    """This process and those of its engine on this host. `others` are children that it had before the engine."""
    return {os.getpid(), *_with_descendants(children() - others)}


def forget_names(others: Set[int]) -> None:
    """Take the names of the blocks of this process's engine away, those of ranks elsewhere on this host too.

    For an engine that is up: vLLM's queues and communicators open a block when they are made, never later. `others` are
    children that this process had before: whatever they start is not the engine's, and may need its names yet.
    """
    theirs = sharers(set().union(*map(blocks_of, own_processes(others))))
    unlink(set().union(*theirs.values()))


def _end() -> None:
    unlink(set().union(*sharers(blocks_of(os.getpid())).values()))
    os.kill(os.getpid(), signal.SIGKILL)  # not sys.exit: the main thread may spin in native code


def _watch(gone: Callable[[], bool], pause: Callable[[float], object] = time.sleep) -> None:
    while not gone():
        try:
            pause(POLL_S)
        except Exception:  # whatever it is that it looks at meanwhile: the owner is watched all the same
            time.sleep(POLL_S)
    _end()


def watch() -> None:
    """Plugin for vllm.general_plugins: watch the owner, if there is one and this is not it. Does nothing elsewhere."""
    sockets.only_where_it_is()
    owner = os.environ.get(MARK, "")
    if not owner or owner == mark(os.getpid()) or alive(owner) is None or _started.is_set():
        return
    _started.set()
    pause: Callable[[float], object] = time.sleep
    members = end_causes.Members() if end_causes.own_name() == end_causes.CORE else None
    end_causes.keep(members)
    if members is not None:
        pause = members.wait
        with contextlib.suppress(ImportError, AttributeError):  # another release's name
            end_causes.note_early_ends()
    threading.Thread(
        target=_watch, args=(lambda: not alive(owner), pause), name="headrace-watchdog", daemon=True
    ).start()
