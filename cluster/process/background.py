"""Processes that work behind those whose callers wait. What a system refuses is left as it is."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

NICENESS: Final = 5
"""More than its parent's."""
SESSION_NICENESS: Final = 10
"""For the process's session, which is what counts where Linux shares the processors by session. Without rights the
kernel takes ten of these a second from the whole machine; a further one is lost."""


def put_behind(pid: int) -> None:
    """A child that leads a session of its own, behind an event loop where the two want one core. To be called by its
    parent, soon: a Python that starts is busy for longer than a loop may wait."""
    with suppress(OSError):  # it has ended already
        os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
    with suppress(OSError):  # not Linux, built without it, or too many at once
        Path(f"/proc/{pid}/autogroup").write_text(str(SESSION_NICENESS))


def put_last(pid: int) -> None:
    """A child that runs where nothing else wants to, for work that can wait, or that somebody else can do.
    A core that runs only such is idle for whoever wakes up, which one with a merely nice process is not: an event loop
    then waits 20 ms on the other core."""
    put_behind(pid)
    with suppress(OSError, AttributeError):  # it has ended, a sandbox forbids it, or this is not Linux
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
