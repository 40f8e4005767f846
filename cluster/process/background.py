"""Lower scheduling priority for helper processes. A setting that the system refuses is skipped."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

NICENESS: Final = 5
"""Increment of a child's nice value over the parent's."""
SESSION_NICENESS: Final = 10
"""Nice value of the child's session, which counts where Linux shares the CPUs by session (autogroup). Without
privileges the kernel accepts ten of these settings a second for the whole machine, and drops the others."""


def lower_priority(pid: int) -> None:
    """Give a child process less CPU than an event loop that wants the same core. The child must lead its own session.

    The parent calls this function soon after the child's start: a starting Python is busy for longer than an event loop
    may wait."""
    with suppress(OSError):  # the child has ended already
        os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
    with suppress(OSError):  # not Linux, no autogroup in this kernel, or too many settings at once
        Path(f"/proc/{pid}/autogroup").write_text(str(SESSION_NICENESS))


def run_when_idle(pid: int) -> None:
    """Let a child process run only when nothing else wants the core (SCHED_IDLE), for work that can wait or be done
    elsewhere.

    If a core runs only such processes, the kernel treats the core as idle when another process wakes up. A core whose
    process is merely nice does not count as idle: an event loop then waits 20 ms on another core."""
    lower_priority(pid)
    with suppress(OSError, AttributeError):  # the child has ended, a sandbox forbids it, or this is not Linux
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
