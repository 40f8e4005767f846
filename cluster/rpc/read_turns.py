"""How much of one pass of the event loop reading may take: large requests are read on in turns, a few at a time.

Problem: when many long prompts come at once, every connection is readable in the same pass of the loop, and all that
they sent is parsed, and every call begun, before any token under way is looked at: 20 ms for fifty prompts of 220 KB.
What is short is read at once, as a message of tokens is never long.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

PASS_S: Final = 0.002
"""Of one pass; the piece that begins within it is finished, which takes a third of a millisecond for 64 KiB."""


class Reader(Protocol):
    """Who takes what was read."""

    def take(self, data: bytes) -> None:
        """The next bytes, in order."""


class ReadTurns:
    """Pieces that wait, in the order in which they came. Used from one event loop."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._waiting: deque[tuple[Reader, bytes]] = deque()
        self._due = False

    def put(self, reader: Reader, data: bytes) -> None:
        """In a coming pass, after those that wait already."""
        self._waiting.append((reader, data))
        self._again()

    def _turn(self) -> None:
        self._due = False
        until = self._clock() + PASS_S
        try:
            while self._waiting and self._clock() < until:
                reader, data = self._waiting.popleft()
                reader.take(data)
        finally:  # whatever one of them met, the others go on
            self._again()

    def _again(self) -> None:
        if self._waiting and not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._turn)
