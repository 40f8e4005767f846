"""CPU time that the front end (all processes except the engines) uses between two moments. It is read from the kernel's
CPU clock of each process, with nanosecond resolution.

processes.py counts in steps of 10 ms, which is too coarse for a single call. These clocks also count threads that
have ended.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import psutil

from loadtests.processes import ENGINE, NOBODY, classify

HELPERS = "gateway helpers"
_HELPER = "cluster.gateway.helpers"


def process_cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process has used. Raises OSError if there is no such process."""
    # The id of another process's CPU clock, as clock_getcpuclockid(3) makes it: ~pid << 3 | CPUCLOCK_SCHED.
    return time.clock_gettime(~pid << 3 | 2)


class FrontEndClocks:
    """The CPU clocks of some root processes and all their descendants, except engine cores, ranks and simulated
    engines."""

    def __init__(self, roots: Sequence[tuple[int, str]]) -> None:
        """Find the processes whose CPU time is measured. `roots`: (pid, class of process) of each root process."""
        self._roots = roots
        self._kinds: dict[int, str] = {}
        self._last: dict[int, float] = {}
        self.find_processes()

    def find_processes(self) -> None:
        """Add the processes that have started since the last call. Their CPU time counts from their start."""
        for pid, kind in self._roots:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._add(psutil.Process(pid), kind)

    def _add(self, process: psutil.Process, kind: str) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline())
            kind = HELPERS if _HELPER in command else classify(command, kind)
            if kind not in ENGINE | NOBODY:
                self._kinds[process.pid] = kind
            else:
                self._kinds.pop(process.pid, None)
            for child in process.children():
                self._add(child, kind)

    def read(self) -> dict[str, float]:
        """Return the CPU seconds used so far, by class of process. A process that has ended keeps its last value."""
        out: dict[str, float] = {}
        for pid, kind in self._kinds.items():
            with contextlib.suppress(OSError):
                self._last[pid] = process_cpu_s(pid)
            out[kind] = out.get(kind, 0.0) + self._last.get(pid, 0.0)
        return out


def used_between(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Return the CPU seconds between two readings, by class of process."""
    return {kind: value - before.get(kind, 0.0) for kind, value in after.items()}
