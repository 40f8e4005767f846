"""Sleeps of any length end at common ticks, whenever they start."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.process import ticks
from cluster.process.ticks import TICK_S, seconds_to_tick

NOW = st.floats(0, 1e7)
PERIOD = st.floats(TICK_S, 30)


def off_s(at: float) -> float:
    """Return the distance of a time from the nearest tick, in seconds."""
    return abs(at - round(at / TICK_S) * TICK_S)


@given(NOW, PERIOD)
def test_a_rest_ends_at_a_tick_and_is_about_as_long_as_asked(now: float, period_s: float) -> None:
    """A sleep ends at a tick, is at most half a tick longer than requested, and at most a tick and a half shorter."""
    got = seconds_to_tick(now, period_s)
    assert off_s(now + got) < 1e-6
    assert period_s - 1.5 * TICK_S - 1e-3 <= got <= period_s + 0.5 * TICK_S + 1e-3
    assert got > 0


@given(NOW, PERIOD, st.floats(-0.5e-4, 0.05))
def test_who_is_woken_at_a_tick_rests_whole_ticks(now: float, period_s: float, late_s: float) -> None:
    """A sleeper whose timer fires slightly early or late is not woken twice at one tick and misses no tick."""
    tick = round(now / TICK_S) * TICK_S
    ends = tick + late_s + seconds_to_tick(tick + late_s, period_s)
    assert ends - tick == pytest.approx(math.floor(period_s / TICK_S + 0.5) * TICK_S, abs=1e-6)


@given(NOW, st.floats(0.001, TICK_S, exclude_max=True))
def test_what_is_shorter_than_a_tick_stays(now: float, period_s: float) -> None:
    """A period shorter than a tick is not changed."""
    assert seconds_to_tick(now, period_s) == period_s


async def test_two_are_woken_together() -> None:
    """Two sleepers whose sleeps end at the same tick are woken together."""
    loop, woken = asyncio.get_running_loop(), []

    async def look(period_s: float) -> None:
        await ticks.sleep_to_tick(period_s)
        woken.append(loop.time())

    await asyncio.gather(look(0.2), look(0.24))
    assert abs(woken[0] - woken[1]) < TICK_S / 2
