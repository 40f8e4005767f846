"""Processes that work behind those whose callers wait."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

NICENESS: Final = 5
SESSION_NICENESS: Final = 10
"""For the process's session, which is what counts where Linux shares the processors by session."""


def put_behind(pid: int) -> None:
    """A child that leads a session of its own, behind an event loop where the two want one core. To be called by its
    parent, at once: a Python that starts is busy for longer than a loop may wait."""
    with suppress(OSError):  # it has ended already
        os.setpriority(os.PRIO_PROCESS, pid, NICENESS)
    with suppress(OSError):  # not Linux, or built without it
        Path(f"/proc/{pid}/autogroup").write_text(str(SESSION_NICENESS))


def last_of_all(pid: int) -> None:
    """A child that nobody waits for: it runs where nothing else wants to. A core that runs only such is idle for
    whoever wakes up, which one with a merely nice process is not: an event loop then waits 20 ms on the other core."""
    with suppress(OSError, AttributeError):  # it has ended already, or this is not Linux
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
    put_behind(pid)
