"""Gives helper processes a lower scheduling priority. Settings that the operating system refuses are skipped."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

NICENESS: Final = 5
"""Increment of a child's nice value over the parent's."""
SESSION_NICENESS: Final = 10
"""Nice value of the child's session, used if Linux shares the CPUs by session (autogroup). From unprivileged processes
the kernel accepts only ten such settings a second on the whole machine."""


def lower_priority(pid: int) -> None:
    """Give a child process less CPU time than an event loop on the same core. The child must lead its own session.

    Call this function right after the child's start: the start of Python alone would keep an event loop on the same
    core waiting for too long.
    """
    lower_threads(pid, NICENESS)
    with suppress(OSError):  # not Linux, no autogroup in this kernel, or too many settings at once
        Path(f"/proc/{pid}/autogroup").write_text(str(SESSION_NICENESS))


def lower_threads(pid: int, niceness: int) -> None:
    """Raise the nice value of all present threads of a process by `niceness` over this process's."""
    for tid in _threads(pid):
        with suppress(OSError):  # the thread has ended already
            os.setpriority(os.PRIO_PROCESS, tid, os.getpriority(os.PRIO_PROCESS, 0) + niceness)


def run_when_idle(pid: int) -> None:
    """Let a child process run only while its core is otherwise idle. The child must lead its own session."""
    lower_priority(pid)
    run_threads_when_idle(pid)


def run_threads_when_idle(pid: int) -> None:
    """Let all present threads of a process run only while their core is otherwise idle (SCHED_IDLE). This is for work
    that can wait or that another process can do.

    The kernel treats a core that runs only SCHED_IDLE threads as idle, so a waking event loop can run there at once. A
    core that runs a thread with a high nice value counts as busy, and the event loop may then wait up to 20 ms. Linux
    sets priorities by thread, and a new thread inherits its creator's.
    """
    for tid in _threads(pid):
        with suppress(OSError, AttributeError):  # the thread has ended, a sandbox forbids it, or this is not Linux
            os.sched_setscheduler(tid, os.SCHED_IDLE, os.sched_param(0))


def _threads(pid: int) -> list[int]:
    try:
        return [int(tid) for tid in os.listdir(f"/proc/{pid}/task")]
    except OSError:  # the process has ended, or this is not Linux
        return [pid]
