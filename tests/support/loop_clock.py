"""A clock that counts only the time in which the event loop runs, not the time in which it gets no CPU core."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Final, Self, TypeVar

TURN_S: Final = 0.01
HANG_S: Final = 60.0
T = TypeVar("T")


class LoopClock:
    """Clock that advances by TURN_S seconds with each turn of the event loop, while the context is open.

    Work that waits for timers and for other threads takes as many turns on a busy machine as on an idle machine. So the
    clock measures the same time on both.
    """

    def __init__(self) -> None:
        """Create a clock at 0."""
        self.turns = 0
        self.stalled_s = 0.0
        """Time in seconds for which the loop has stood still, without stalls of less than TURN_S."""

    @property
    def now_s(self) -> float:
        """Time that the event loop has run since the context was entered, in seconds. It is at most the real time since
        then, because the clock stops while the loop is blocked."""
        return self.turns * TURN_S

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began_s = loop.time()
            await asyncio.sleep(TURN_S)
            self.turns += 1
            took_s = loop.time() - began_s
            self.stalled_s += took_s - TURN_S if took_s > 2 * TURN_S else 0.0


async def within(bound_s: float, work: Awaitable[T]) -> T:
    """Await `work`, and assert that it takes at most `bound_s` seconds on a LoopClock.

    After HANG_S seconds `work` is cancelled with TimeoutError.
    """
    async with LoopClock() as clock:
        result = await asyncio.wait_for(work, HANG_S)
    assert clock.now_s <= bound_s, f"{clock.now_s:.2f} s of the event loop, where {bound_s:g} s are allowed"
    return result
