"""Lower scheduling priority for helper processes. Settings that the system refuses are skipped."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

NICENESS: Final = 5
"""Added to the parent's nice value."""
SESSION_NICENESS: Final = 10
"""Nice value of the process's session, which counts where Linux shares the CPUs by session (autogroup). Without
privileges the kernel accepts ten of these settings a second for the whole machine, and drops others."""


def lower_priority(pid: int) -> None:
    """Give a child, which must lead its own session, less CPU than an event loop that wants the same core.

    The parent calls this soon after the start: a starting Python is busy for longer than an event loop may wait."""
    with suppress(OSError):  # the child has ended already
        os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
    with suppress(OSError):  # not Linux, no autogroup in this kernel, or too many settings at once
        Path(f"/proc/{pid}/autogroup").write_text(str(SESSION_NICENESS))


def run_when_idle(pid: int) -> None:
    """Let a child run only when nothing else wants the core (SCHED_IDLE), for work that can wait or be done elsewhere.

    The kernel treats a core that runs only such processes as idle for a process that wakes up. A core with a process
    that is merely nice does not count as idle: an event loop then waits 20 ms on another core."""
    lower_priority(pid)
    with suppress(OSError, AttributeError):  # the child has ended, a sandbox forbids it, or this is not Linux
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
