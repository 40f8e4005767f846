"""Common wake-up times for periodic work: waking a process costs more than most periodic checks.

A sleeping process wakes with cold caches (about 0.1 ms on a small machine); further work in the same tick costs a few
microseconds. So all sleeps end at common ticks of the loop's clock, TICK_S apart.
"""

from __future__ import annotations

import asyncio
import math

TICK_S = 0.1
_NEAR = 1e-3
"""Tolerance for timers, as a part of a tick. A tick counts as reached if a timer fires early by less than the
tolerance."""


def seconds_to_tick(now: float, period_s: float) -> float:
    """Seconds until the tick that ends a sleep of `period_s`. The period is rounded to whole ticks, and the first tick
    may be shorter.

    A period shorter than a tick is returned unchanged.
    """
    if period_s < TICK_S:
        return period_s
    ticks = math.floor(period_s / TICK_S + 0.5)
    return (math.floor(now / TICK_S + _NEAR) + ticks) * TICK_S - now


async def sleep_to_tick(period_s: float) -> None:
    """Sleep for about `period_s` seconds, until a common tick."""
    await asyncio.sleep(seconds_to_tick(asyncio.get_running_loop().time(), period_s))
