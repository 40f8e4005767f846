"""Watchdog: each process of an engine ends itself soon after the engine's owner process is gone.

Problem: when its parent is killed, vLLM's engine core keeps running (and spins), and its ranks keep their memory. So
the owner (the replica's process) puts a mark into the environment, which its children inherit. A vLLM plugin (entry
point group vllm.general_plugins), loaded in every vLLM process, starts a thread that watches the marked process. The
mark consists of pid, start time, boot id and pid namespace: a pid alone may be reused, and Ray copies the environment
to other nodes, where the pid has no meaning. On those nodes the thread is not started. Ray ends the ranks there, since
they are actors whose owner has died.

A killed process leaves the names of its shared memory and its semaphores behind. All processes of an engine may be
killed at the same moment, multiprocessing's resource tracker included. So the names are unlinked as soon as the engine
is up. All processes have mapped the memory by then, and the kernel frees the memory when the last process ends. If an
engine ends before it is up, its core and ranks unlink the names when they end themselves, and so does the reaper
(ray/reaper.py) when it ends these processes.
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

from cluster.worker.engine.processes import end_causes, exit_status, sockets

MARK = "HEADRACE_WATCHDOG_PID"
POLL_S = 0.5
SHARED_MEMORY = re.compile(r"psm_\w+|.+-cpushm(-[\w-]+)?_\d+")
"""Pattern of an engine's shared memory names in /dev/shm, from multiprocessing and vLLM's CPU communicator."""

_started = threading.Event()


def _start_time(pid: int) -> str:
    """Return a process's start time in clock ticks since boot; empty if the process is gone or a zombie."""
    fields = exit_status.stat_fields(pid)
    return "" if not fields or fields[0] in "ZX" else fields[19]


def _pid_scope() -> str:
    """Return the ids of this boot and of this pid namespace. Within these, a pid identifies a process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def mark(pid: int) -> str:
    """Return a text that identifies a process: no other process has the same text, not even on another host. Empty if
    there is no /proc or no such process."""
    start, here = _start_time(pid), _pid_scope()
    return f"{pid}@{start}@{here}" if start and here else ""


def arm() -> None:
    """Make this process the owner of the engine processes that it starts from now on: these processes watch it."""
    own = mark(os.getpid())
    if own:
        os.environ[MARK] = own


def alive(owner: str) -> bool | None:
    """Return whether the process with the mark `owner` is alive; None for a mark from another host or pid namespace."""
    pid, _, rest = owner.partition("@")
    start, _, here = rest.partition("@")
    if not pid.isdigit() or not start or here != _pid_scope():
        return None
    return _start_time(int(pid)) == start


def shared_memory_files(maps: str) -> set[str]:
    """Return the names of an engine's shared memory that occur in `maps`, the text of /proc/<pid>/maps."""
    names = set()
    for line in maps.splitlines():
        path = line.partition("/dev/shm/")[2]  # noqa: S108
        if SHARED_MEMORY.fullmatch(path):  # an unlinked file ends with " (deleted)"
            names.add(path)
    return names


def mapped_shared_memory(pid: int | str) -> set[str]:
    """Return the names of the shared memory that a process has mapped; empty if the process has ended."""
    try:
        return shared_memory_files(Path(f"/proc/{pid}/maps").read_text())
    except OSError:  # the process has ended, or belongs to another user
        return set()


def semaphores(pids: Iterable[int]) -> set[str]:
    """Return the names, in /dev/shm, of the multiprocessing semaphores that any of the processes has mapped.

    Files are compared by inode: the C library maps a new semaphore under a temporary name, so /proc shows another name.
    """
    mapped = set().union(*map(_mapped_semaphores, pids))
    names = set()
    for file in Path("/dev/shm").glob("sem.mp-*") if mapped else ():  # noqa: S108
        with contextlib.suppress(FileNotFoundError):
            status = file.stat()
            if (f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", str(status.st_ino)) in mapped:
                names.add(file.name)
    return names


def _mapped_semaphores(pid: int) -> set[tuple[str, str]]:
    """Return device and inode of the semaphores that a process has mapped."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # the process has ended, or belongs to another user
        return set()
    rows = [line.split(maxsplit=5) for line in maps.splitlines() if "/dev/shm/sem." in line]  # noqa: S108
    return {(row[3], row[4]) for row in rows}


def children() -> set[int]:
    """Return the pids of this process's children."""
    return {child.pid for child in psutil.Process().children()}


def _with_descendants(roots: Iterable[int]) -> set[int]:
    pids: set[int] = set()
    for pid in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            pids |= {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    return pids


def sharers(names: set[str]) -> dict[int, set[str]]:
    """Return the processes on this host that have mapped at least one of the shared-memory names `names`. The result
    maps the pid of each such process to all shared-memory names of engines that it has mapped.

    The result includes ranks that Ray has placed. Those ranks are not descendants of this process, and they may be
    killed before they can unlink their names.
    """
    pids = [int(process.name) for process in Path("/proc").iterdir() if process.name.isdigit()] if names else []
    return {pid: mapped for pid in pids if (mapped := mapped_shared_memory(pid)) & names}


def unlink(names: Iterable[str]) -> None:
    """Unlink shared memory or semaphores by name.

    A process that has mapped the memory keeps it until the process ends.
    """
    for name in names:
        try:
            os.unlink(f"/dev/shm/{name}")  # noqa: S108
        except OSError:
            continue  # another process has unlinked the name already


def own_processes(others: Set[int]) -> set[int]:
    """Return this process and the processes of its engine on this host.

    `others`: children that this process had before the engine.
    """
    return {os.getpid(), *_with_descendants(children() - others)}


def forget_names(others: Set[int]) -> None:
    """Unlink the names of all shared memory and semaphores that this process's engine uses.

    The engine includes its ranks, also those that Ray has started. The engine must be up: vLLM opens its queues,
    communicators and locks by name only when it creates them.

    `others`: children that this process had before the engine. Names that only these children and their descendants
    use are kept. Semaphores that this process itself uses are kept too, since it may still pass on their names.
    """
    own = own_processes(others)
    mapped = sharers(set().union(*map(mapped_shared_memory, own)))
    unlink(set().union(*mapped.values()))
    unlink(semaphores(own) - semaphores({os.getpid(), *_with_descendants(others)}))


def _end_process() -> None:
    unlink(semaphores({os.getpid()}).union(*sharers(mapped_shared_memory(os.getpid())).values()))
    os.kill(os.getpid(), signal.SIGKILL)  # not sys.exit: the main thread may spin in native code


def _watch(gone: Callable[[], bool], pause: Callable[[float], object] = time.sleep) -> None:
    while not gone():
        try:
            pause(POLL_S)
        except Exception:  # an error in `pause` must not end the watch
            time.sleep(POLL_S)
    _end_process()


def watch() -> None:
    """Plugin for vllm.general_plugins: start the thread that watches the owner.

    Does nothing in the owner itself, or if there is no owner.
    """
    sockets.restore_default_elsewhere()
    owner = os.environ.get(MARK, "")
    if not owner or owner == mark(os.getpid()) or alive(owner) is None or _started.is_set():
        return
    _started.set()
    pause: Callable[[float], object] = time.sleep
    members = end_causes.Members() if end_causes.process_name() == end_causes.CORE else None
    end_causes.register(members)
    if members is not None:
        pause = members.wait
        with contextlib.suppress(ImportError, AttributeError):  # the name differs in another vLLM release
            end_causes.note_early_ends()
    threading.Thread(
        target=_watch, args=(lambda: not alive(owner), pause), name="headrace-watchdog", daemon=True
    ).start()
