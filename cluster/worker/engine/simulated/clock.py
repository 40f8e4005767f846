"""Clocks of the simulated engine: a clock of real time, and a clock of virtual time that jumps."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock in seconds."""

    def now(self) -> float:
        """Return the current time."""

    async def sleep_until(self, when: float) -> None:
        """Return at `when` or later; return at once if `when` is in the past."""


class WallClock:
    """A clock of real time. Deadlines are absolute, so that late wake-ups do not add up to a drift."""

    def now(self) -> float:
        """Return the current time."""
        return time.monotonic()

    async def sleep_until(self, when: float) -> None:
        """Sleep until `when`.

        The call yields once even if `when` is in the past, so that a fast engine cannot starve the event loop.
        """
        await asyncio.sleep(max(0.0, when - time.monotonic()))


class VirtualClock:
    """A clock that jumps to each deadline, for one engine.

    A simulation then takes only the time to compute the steps.
    """

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def now(self) -> float:
        """Return the current virtual time."""
        return self._now

    async def sleep_until(self, when: float) -> None:
        """Yield once to other tasks, then jump to `when`."""
        await asyncio.sleep(0)
        self._now = max(self._now, when)
