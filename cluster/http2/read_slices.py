"""How much of one pass of the event loop reading may take: what takes longer goes on in turns, one slice each.

Problem: when many long prompts come at once, or one client sends thousands of tiny frames, all that was read would be
parsed, and every call begun, before any token under way is looked at. What is short is read at once, as a message of
tokens is never long, while the reads of the last moments took less than their share.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

PASS_S: Final = 0.005
"""Of one pass; the slice that begins within it is finished. Calls that come together cost less together: with 2 ms a
burst of 256 took 6 % more CPU, since each step of the engine then found a few more of them."""
SLICE_S: Final = 0.002
"""A reader's slice ends with the frame that passes this."""
WINDOW_S: Final = 0.006
"""Reads at once may take PASS_S of so long."""


class Reader(Protocol):
    """A connection with bytes to parse."""

    def take(self, until: float) -> bool:
        """Parse until the clock says so; whether anything is left."""


class ReadTurns:
    """Readers that wait, in turn. Used from one event loop."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._waiting: deque[Reader] = deque()
        self._due = False
        self._window_at = -WINDOW_S
        self._used_s = 0.0

    def now(self, reader: Reader) -> bool:
        """Parse a slice now, if the last moments left room; whether anything is left, for `put`."""
        begin = self._clock()
        if begin - self._window_at >= WINDOW_S:
            self._window_at, self._used_s = begin, 0.0
        elif self._used_s >= PASS_S:
            return True
        left = reader.take(begin + SLICE_S)
        self._used_s += self._clock() - begin
        return left

    def put(self, reader: Reader) -> None:
        """In a coming pass, after those that wait already. A reader waits at most once at a time."""
        self._waiting.append(reader)
        self._again()

    def _turn(self) -> None:
        self._due = False
        now = self._clock()
        until = now + PASS_S
        try:
            while self._waiting and now < until:
                reader = self._waiting.popleft()
                if reader.take(now + SLICE_S):
                    self._waiting.append(reader)
                now = self._clock()
        finally:  # whatever one of them met, the others go on
            self._again()

    def _again(self) -> None:
        if self._waiting and not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._turn)
