"""A time limit for parsing received bytes in one event-loop pass; longer work continues in turns of one slice.

Problem: when many long prompts arrive at once, or one client sends thousands of tiny frames, parsing everything and
starting every call would delay all tokens being streamed. Short reads, such as a message of tokens, are parsed at once
as long as the recent reads took less than their share of time.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

PASS_S: Final = 0.005
"""Parsing time per event-loop pass; a slice that began within it is finished. Calls that arrive together cost less
together: with 2 ms a burst of 256 took 6 % more CPU, since each engine step then got only a few more of them."""
SLICE_S: Final = 0.002
"""A reader's slice ends with the frame that exceeds this."""
WINDOW_S: Final = 0.006
"""Period in which reads parsed at once may use PASS_S."""


class Reader(Protocol):
    """A connection with bytes to parse."""

    def parse(self, until: float) -> bool:
        """Parse until the clock reaches `until`; returns whether bytes are left."""


class ReadTurns:
    """Readers that wait, in turn. Used from one event loop."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._waiting: deque[Reader] = deque()
        self._due = False
        self._window_at = -WINDOW_S
        self._used_s = 0.0

    def parse_now(self, reader: Reader) -> bool:
        """Parse a slice now if recent reads left time for it; returns whether bytes are left, to be queued by `put`."""
        begin = self._clock()
        if begin - self._window_at >= WINDOW_S:
            self._window_at, self._used_s = begin, 0.0
        elif self._used_s >= PASS_S:
            return True
        more = reader.parse(begin + SLICE_S)
        self._used_s += self._clock() - begin
        return more

    def put(self, reader: Reader) -> None:
        """Queue a reader for a coming pass. A reader must not be queued twice."""
        self._waiting.append(reader)
        self._schedule_turn()

    def _run_turn(self) -> None:
        self._due = False
        now = self._clock()
        until = now + PASS_S
        try:
            while self._waiting and now < until:
                reader = self._waiting.popleft()
                if reader.parse(now + SLICE_S):
                    self._waiting.append(reader)
                now = self._clock()
        finally:  # an exception of one reader must not stop the others
            self._schedule_turn()

    def _schedule_turn(self) -> None:
        if self._waiting and not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._run_turn)
