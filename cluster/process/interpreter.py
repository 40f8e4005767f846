"""Thread switching for a process with an event loop: waiting threads get the interpreter lock soon."""

from __future__ import annotations

import sys
from typing import Final

SWITCH_S: Final = 0.0005


def shorten_switch_interval() -> None:
    """Shorten the interpreter's switch interval, for a process with an event loop and busy threads.

    The loop releases the lock with every send, and waits up to the interval to get it back. With CPython's 5 ms, a
    thread that read a tokenizer or worked on the ledger delayed twenty sends by a tenth of a second."""
    sys.setswitchinterval(SWITCH_S)
