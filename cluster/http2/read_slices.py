"""A time limit for parsing received bytes in one event-loop pass. If more time is needed, parsing continues in later
passes, and the connections take turns with one slice of time each.

Problem: when many long prompts arrive at once, or one client sends thousands of tiny frames, parsing everything and
starting every call would delay all streamed tokens. Short reads, such as a message of tokens, are parsed at once while
recent reads have used less than their share of time.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

PASS_S: Final = 0.005
"""Parsing time per event-loop pass, in seconds; a slice that began within this time is finished. Parsing many calls in
one pass costs less: with a limit of 2 ms, a burst of 256 calls took 6 % more CPU, because each engine step got fewer of
the calls."""
SLICE_S: Final = 0.002
"""Length of a reader's slice, in seconds; the frame that exceeds the length is finished."""
WINDOW_S: Final = 0.006
"""Period in seconds. In each period, the reads that are parsed at once may take PASS_S in total."""


class Reader(Protocol):
    """A connection that has received bytes to parse."""

    def parse(self, until: float) -> bool:
        """Parse bytes until the clock reaches `until`. Returns whether unparsed bytes are left."""


class ReadTurns:
    """The readers that wait for their turn to parse. Used from one event loop."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._waiting: deque[Reader] = deque()
        self._due = False
        self._window_at = -WINDOW_S
        self._used_s = 0.0

    def parse_now(self, reader: Reader) -> bool:
        """Parse for one slice of time, without waiting for a turn. If recent calls of this method have used up their
        share of time, parse nothing. Returns whether unparsed bytes may be left; if so, the caller must queue the
        reader with `put`."""
        begin = self._clock()
        if begin - self._window_at >= WINDOW_S:
            self._window_at, self._used_s = begin, 0.0
        elif self._used_s >= PASS_S:
            return True
        more = reader.parse(begin + SLICE_S)
        self._used_s += self._clock() - begin
        return more

    def put(self, reader: Reader) -> None:
        """Queue a reader that is not queued yet, to parse its bytes in a later event-loop pass."""
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
