"""Thread switching for a process with an event loop: waiting threads soon get the interpreter lock."""

from __future__ import annotations

import sys
from typing import Final

SWITCH_S: Final = 0.0005


def shorten_switch_interval() -> None:
    """Shorten the interpreter's switch interval, for a process with an event loop and busy threads.

    The event loop releases the interpreter lock with every send, and waits up to the switch interval to get the lock
    back. With CPython's 5 ms, a thread that read a tokenizer or worked on the ledger delayed twenty sends by a tenth of
    a second."""
    sys.setswitchinterval(SWITCH_S)
