"""What a process does to work behind those whose callers wait."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

NICENESS: Final = 5
SESSION_NICENESS: Final = 10
"""For this process's session, which is what counts where Linux shares the processors by session."""
_SESSION = Path("/proc/self/autogroup")


def stand_back() -> None:
    """Behind an event loop, where the two want one core. For a process that leads a session of its own."""
    os.nice(NICENESS)
    with suppress(OSError):  # not Linux, or built without it
        _SESSION.write_text(str(SESSION_NICENESS))
