"""CPU starvation: detection of whether a step without progress hangs or waits for a CPU core.

Problem: on a busy machine a step can take arbitrarily long, which looks like a hang. The kernel's thread states
distinguish the two. A hung thread sleeps, is stopped or uses CPU time. A starved thread is runnable and waits for a
core. Linux counts the time for which a thread has waited, but updates this counter (the run delay) only when the thread
runs again. Until then, a starved thread is recognized because it is runnable and uses no CPU time.

Invariant: only time in which a thread of the engine waited for a core counts as lost, and it counts once. Starvation
explains a step's age if the age minus the lost time is within the bound for steps. So on a busy machine, a hang is
detected later, in proportion to the CPU share that the engine does not get. On an idle machine there is no delay.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

BUSY = "cpu"
"""Value of `busy` in the load of an engine that gets no CPU core."""
LOOK_AFTER_S = 0.15
"""Age of a step in seconds from which /proc is read."""
LEAST_WINDOW_S = 0.04
LEAST_S, STEPS = 0.5, 5
"""Bound for a step's age: the greater of LEAST_S seconds and STEPS times the p99 of step durations, as in
gateway/links/liveness.py."""
SHARE = 0.3
"""Fraction of a step's age that must be lost before starvation explains the age."""
IDLE_SHARE = 0.2
"""Fraction of the time between two readings. A thread that was runnable at both readings and ran for less than this
fraction counts as waiting for a core during the rest of the time."""


class Task(NamedTuple):
    """A thread: for how many seconds it has run, for how many seconds it has waited for a CPU core, and whether it is
    runnable now."""

    ran_s: float
    waited_s: float
    runnable: bool


Tasks = Mapping[tuple[int, int], Task]
"""Threads, by (process id, thread id)."""


def lost_s(before: Tasks, after: Tasks, window_s: float) -> float:
    """Return the longest time, in seconds, for which one of the threads waited for a CPU core between two readings.

    `before`, `after`: the two readings. `window_s`: seconds between them.
    """
    most = 0.0
    for key, now in after.items():
        then = before.get(key)
        if then is None:
            continue
        ran = max(now.ran_s - then.ran_s, 0.0)
        waited = max(now.waited_s - then.waited_s, 0.0)
        if then.runnable and now.runnable and ran < IDLE_SHARE * window_s:
            waited = max(waited, window_s - ran)
        if waited > ran:  # a thread with more than half of a core is slow, but not slow enough to exceed a step's bound
            most = max(most, waited)
    return min(most, window_s)


def read_tasks(pids: Iterable[int]) -> Tasks:
    """Return the threads of these processes; an empty mapping if /proc cannot be read.

    Threads of this process itself never count as runnable, because the thread that calls this function is runnable at
    every reading.
    """
    own = os.getpid()
    return {
        (pid, int(folder.name)): task
        for pid in pids
        for folder in _folders(pid)
        if (task := _read(folder, pid != own)) is not None
    }


def _folders(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:  # the process has ended
        return []


def _read(folder: Path, with_state: bool) -> Task | None:
    try:
        ran_ns, waited_ns, _ = (folder / "schedstat").read_text().split()
        state = (folder / "stat").read_text().rpartition(")")[2].split()[0] if with_state else ""
        return Task(int(ran_ns) / 1e9, int(waited_ns) / 1e9, state == "R")
    except (OSError, ValueError, IndexError):
        return None


@dataclass(slots=True)
class _WatchedStep:
    """The last reading of the engine's threads. `lost_s`: time in the current step for which the threads have waited
    for a CPU core so far."""

    read_at: float
    tasks: Tasks
    lost_s: float = 0.0


class Starvation:
    """Measures how long one engine waits for CPU cores during its current step. `explains` uses this time to
    distinguish a starved engine from a hung one. Thread-safe."""

    def __init__(self, read: Callable[[], Tasks]) -> None:
        self._read = read
        self._step: _WatchedStep | None = None
        self._lock = threading.Lock()

    def explains(self, age_s: float, p99_s: float, now: float) -> bool:
        """Return whether CPU starvation explains the current step's age.

        `age_s`, `p99_s`: the step's age and the p99 of step durations, in seconds.
        """
        if age_s < LOOK_AFTER_S:
            self._step = None
            return False
        with self._lock:
            step = self._update(age_s, now)
            return step.lost_s >= SHARE * age_s and age_s - step.lost_s <= max(LEAST_S, STEPS * p99_s)

    def _update(self, age_s: float, now: float) -> _WatchedStep:
        step = self._step
        if step is None or now - step.read_at > age_s:  # the last reading was of an earlier step
            step = self._step = _WatchedStep(now, self._read())
        elif now - step.read_at >= LEAST_WINDOW_S:
            tasks = self._read()
            step.lost_s += lost_s(step.tasks, tasks, now - step.read_at)
            step.read_at, step.tasks = now, tasks
        return step
