"""What looks around a few times a second does so together: a wake-up of a process costs more than most looks.

A process that sleeps is woken with cold caches (about 0.1 ms on a small machine); whatever else is due within the same
tick then costs a few microseconds. So rests end at common ticks of the loop's clock, TICK_S apart.
"""

from __future__ import annotations

import asyncio
import math

TICK_S = 0.1
_NEAR = 1e-3
"""A tick that is this part of a tick away is the one that has just woken somebody: timers may come that early."""


def rest_s(now: float, period_s: float) -> float:
    """Seconds until the tick that ends a rest of `period_s`, rounded to whole ticks; the first may be a tick shorter.

    A period shorter than a tick is kept as it is.
    """
    if period_s < TICK_S:
        return period_s
    ticks = math.floor(period_s / TICK_S + 0.5)
    return (math.floor(now / TICK_S + _NEAR) + ticks) * TICK_S - now


async def rest(period_s: float) -> None:
    """Sleep for about `period_s`, to a common tick."""
    await asyncio.sleep(rest_s(asyncio.get_running_loop().time(), period_s))
