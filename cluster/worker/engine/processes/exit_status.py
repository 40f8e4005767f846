"""Exit statuses of processes on this host that are not children of this process.

The wait system calls return the exit status only for children, but an engine's ranks can be Ray's children. A file
descriptor of a process (pidfd) becomes readable when the process ends. Linux 6.15 and later then give the exit status
to any holder of the descriptor. On any kernel, /proc shows the status of a process while it is a zombie.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import time
from collections.abc import Iterable
from pathlib import Path

_GET_INFO = 3 << 30 | 64 << 16 | 0xFF << 8 | 11
"""Request number of ioctl PIDFD_GET_INFO for the first form of struct pidfd_info, 64 bytes."""
_INFO_EXIT = 1 << 3
_EXIT_CODE_AT = 60
STATUS_WITHIN_S = 0.5
"""Seconds to wait for the status of an ended process. After that the status counts as unknown."""
_POLL_S = 0.005
_EXITING = 0x4
"""Flag PF_EXITING among the kernel's flags of a process."""
UNKNOWN = "ended without a word, as by SIGKILL"
OUT_OF_MEMORY = "the kernel's out-of-memory killer"


def describe(code: int | None) -> str:
    """Return in words how a process with this exit code ended.

    `code`: Python's exit code, negative for a signal; None if unknown.
    """
    if code is None:
        return UNKNOWN
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}"


def out_of_memory_kills() -> int:
    """Return how many processes of this process's control group the out-of-memory killer has killed; 0 if unknown."""
    try:
        group = Path("/proc/self/cgroup").read_text().partition("0::")[2].splitlines()[0].strip("/")
        for folder in (Path("/sys/fs/cgroup") / group, Path("/sys/fs/cgroup")):
            events = folder / "memory.events"
            if events.exists():
                return int(dict(line.split() for line in events.read_text().splitlines()).get("oom_kill", 0))
    except (OSError, ValueError, IndexError):
        pass
    return 0


class Watched:
    """A set of processes; `wait` reports the end of each process once."""

    def __init__(self) -> None:
        self._pidfds: dict[int, int] = {}
        self._seen: set[int] = set()
        self._kills = out_of_memory_kills()

    def add(self, pids: Iterable[int]) -> list[int]:
        """Watch more processes; return the pids that no longer exist.

        If the kernel has no pidfds, no process is watched.
        """
        gone = []
        for pid in set(pids) - self._seen:
            self._seen.add(pid)
            try:
                self._pidfds[os.pidfd_open(pid)] = pid
            except ProcessLookupError:
                gone.append(pid)
            except OSError:  # an older kernel
                continue
        return gone

    def wait(self, timeout_s: float) -> list[tuple[int, str]]:
        """Wait at most `timeout_s` seconds for a process to end.

        For each ended process, return its pid and, in words, how it ended.
        """
        if not self._pidfds:
            time.sleep(timeout_s)
            return []
        poll = select.poll()
        for pidfd in self._pidfds:
            poll.register(pidfd, select.POLLIN)
        ended = []
        for pidfd, _ in poll.poll(timeout_s * 1000):
            pid = self._pidfds.pop(pidfd)
            code = _status(pidfd, pid)
            os.close(pidfd)
            ended.append((pid, describe(code) + self._out_of_memory(code)))
        return ended

    def _out_of_memory(self, code: int | None) -> str:
        before, self._kills = self._kills, out_of_memory_kills()
        return f", sent by {OUT_OF_MEMORY}" if code in (None, -signal.SIGKILL) and self._kills > before else ""


def stat_fields(pid: int) -> list[str]:
    """Return the fields of /proc/<pid>/stat from the state on (after pid and name); empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def is_ending(pid: int) -> bool:
    """Return whether a process is gone, has ended, or is ending (while the kernel releases its memory and files)."""
    fields = stat_fields(pid)
    return not fields or fields[0] in "ZX" or bool(int(fields[6]) & _EXITING)


def _status(pidfd: int, pid: int) -> int | None:
    """Return the exit code of a process that has ended; None if the code cannot be read."""
    deadline = time.monotonic() + STATUS_WITHIN_S
    while True:
        code = _zombie_status(pid)
        code = _pidfd_status(pidfd) if code is None else code
        if code is not None or time.monotonic() > deadline:
            return None if code is None else os.waitstatus_to_exitcode(code)
        time.sleep(_POLL_S)


def _zombie_status(pid: int) -> int | None:
    fields = stat_fields(pid)
    return int(fields[-1]) if fields and fields[0] == "Z" else None


def _pidfd_status(pidfd: int) -> int | None:
    info = bytearray(64)
    struct.pack_into("<Q", info, 0, _INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, _GET_INFO, info, True)
    except OSError:
        return None
    has_exit = struct.unpack_from("<Q", info)[0] & _INFO_EXIT
    return int(struct.unpack_from("<i", info, _EXIT_CODE_AT)[0]) if has_exit else None
