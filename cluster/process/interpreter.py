"""One interpreter for an event loop and the threads beside it: who waits for it gets it soon."""

from __future__ import annotations

import sys
from typing import Final

SWITCH_S: Final = 0.0005


def hand_over_soon() -> None:
    """For a process whose event loop others wait for. The loop gives the interpreter away with every send, and gets it
    back when another thread lets go: after CPython's own 5 ms each time, so that a thread that reads a tokenizer or
    moves the ledger held up twenty sends by a tenth of a second."""
    sys.setswitchinterval(SWITCH_S)
