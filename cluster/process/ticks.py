"""Common wake-up times for periodic work: waking a process costs more than most periodic checks.

A sleeping process wakes with cold caches (about 0.1 ms on a small machine); further work in the same tick costs a few
microseconds. So all sleeps end at common ticks of the loop's clock, TICK_S apart.
"""

from __future__ import annotations

import asyncio
import math

TICK_S = 0.1
_NEAR = 1e-3
"""Fraction of a tick by which a timer may fire early, with the tick still counted as reached."""


def seconds_to_tick(now: float, period_s: float) -> float:
    """Return the seconds from `now` (loop time) to the tick that ends a sleep of `period_s` seconds.

    The period is rounded to whole ticks, counted from the last tick, so the sleep may be up to one tick shorter.
    A period shorter than a tick is returned unchanged.
    """
    if period_s < TICK_S:
        return period_s
    ticks = math.floor(period_s / TICK_S + 0.5)
    return (math.floor(now / TICK_S + _NEAR) + ticks) * TICK_S - now


async def sleep_to_tick(period_s: float) -> None:
    """Sleep for about `period_s` seconds, until a common tick."""
    await asyncio.sleep(seconds_to_tick(asyncio.get_running_loop().time(), period_s))
