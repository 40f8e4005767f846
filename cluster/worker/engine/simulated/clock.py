"""Time as the simulated engine's shell takes it: the wall's, or a virtual one that jumps."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Seconds, monotonic."""

    def now(self) -> float:
        """The time."""

    async def sleep_until(self, when: float) -> None:
        """Return at `when` or later; at once if it is past."""


class WallClock:
    """Real time. Deadlines are absolute, so that a late wake-up does not add up to a drift."""

    def now(self) -> float:
        """The time."""
        return time.monotonic()

    async def sleep_until(self, when: float) -> None:
        """Sleep till then; yields once even when it is past, so that a fast engine cannot starve its loop."""
        await asyncio.sleep(max(0.0, when - time.monotonic()))


class VirtualClock:
    """Jumps to whatever is waited for: an hour of steps takes as long as its arithmetic. For one engine at a time."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def now(self) -> float:
        """The time."""
        return self._now

    async def sleep_until(self, when: float) -> None:
        """Be there, after others had one turn."""
        await asyncio.sleep(0)
        self._now = max(self._now, when)
