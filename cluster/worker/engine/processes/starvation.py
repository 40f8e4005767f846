"""Whether an engine whose step stands still waits for a core: then its machine is busy, and nothing hangs.

Problem: on a busy machine a step takes as long as the scheduler likes, which looks like a hang. The kernel knows
better: a thread that hangs sleeps, is stopped or burns its own time; one without a core is runnable and waits. Linux
adds what a thread has waited to its run delay when it runs again; until then it is runnable with no time of its own.
Invariant: time counts as lost only while a thread of the engine waited for a core, and at most once. A step is excused
as long as it would be within its bound without that time; so a hang on a busy machine is found late, by the share of
the core that the engine does not get, and on a machine that is not busy as early as ever.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

BUSY = "cpu"
"""What an engine is at that gets no core, as its load states it."""
LOOK_AFTER_S = 0.15
"""A younger step is of no interest: nothing is read."""
LEAST_WINDOW_S = 0.04
LEAST_S, STEPS = 0.5, 5
"""A gateway suspects an engine after so long, or so many of its longest steps; see gateway/links/liveness.py."""
SHARE = 0.3
"""So much of a step's age must be lost before that explains it."""
IDLE_SHARE = 0.2
"""A runnable thread that ran for less of the time has waited for the rest."""


class Task(NamedTuple):
    """One thread: seconds that it ran, seconds that it waited for a core before it ran, and whether it is runnable."""

    ran_s: float
    waited_s: float
    runnable: bool


Tasks = Mapping[tuple[int, int], Task]
"""By process and thread id."""


def lost_s(before: Tasks, after: Tasks, window_s: float) -> float:
    """The most that one thread has waited for a core in a window."""
    most = 0.0
    for key, now in after.items():
        then = before.get(key)
        if then is None:
            continue
        ran = max(now.ran_s - then.ran_s, 0.0)
        waited = max(now.waited_s - then.waited_s, 0.0)
        if then.runnable and now.runnable and ran < IDLE_SHARE * window_s:
            waited = max(waited, window_s - ran)
        if waited > ran:  # one that gets more than half of a core is slow, and no step is as slow as its bound
            most = max(most, waited)
    return min(most, window_s)


def read_tasks(pids: Iterable[int]) -> Tasks:
    """The threads of these processes; none where /proc does not tell. Of this process the state says nothing: some of
    its threads are awake to look."""
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
    except OSError:  # it has ended
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
    """What is known of the step under way."""

    read_at: float
    tasks: Tasks
    lost_s: float = 0.0


class Starvation:
    """Of one engine. `explains` may be asked by any thread."""

    def __init__(self, read: Callable[[], Tasks]) -> None:
        self._read = read
        self._step: _WatchedStep | None = None
        self._lock = threading.Lock()

    def explains(self, age_s: float, p99_s: float, now: float) -> bool:
        """Whether a step is as old as it is because the engine gets no core."""
        if age_s < LOOK_AFTER_S:
            self._step = None
            return False
        with self._lock:
            step = self._look(age_s, now)
            return step.lost_s >= SHARE * age_s and age_s - step.lost_s <= max(LEAST_S, STEPS * p99_s)

    def _look(self, age_s: float, now: float) -> _WatchedStep:
        step = self._step
        if step is None or now - step.read_at > age_s:  # another step's
            step = self._step = _WatchedStep(now, self._read())
        elif now - step.read_at >= LEAST_WINDOW_S:
            tasks = self._read()
            step.lost_s += lost_s(step.tasks, tasks, now - step.read_at)
            step.read_at, step.tasks = now, tasks
        return step
