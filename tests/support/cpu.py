"""Time limits for tests on slow or busy machines: each limit is scaled by a reference measurement."""

from __future__ import annotations

import gc
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Final

REFERENCE_S: Final = 0.0055
"""CPU time of the reference work on the machine on which the tests' bounds were set, in seconds."""
_LOOPS: Final = 40_000


def reference_s(clock: Callable[[], float] = time.thread_time) -> float:
    """Return the seconds that a fixed amount of work takes in this thread, by default in CPU time."""
    began_s = clock()
    seen: dict[str, int] = {}
    for number in range(_LOOPS):
        name = str(number % 997)
        seen[name] = seen.get(name, 0) + len(name)
    return clock() - began_s


def slowness(clock: Callable[[], float] = time.thread_time) -> float:
    """Return how many times slower this machine is now than the time limits assume; at least 1.

    `clock`: the clock that measures. A wall clock also counts the time in which this thread has no core.
    """
    return max(1.0, reference_s(clock) / REFERENCE_S)


@contextmanager
def time_within(bound_s: float) -> Iterator[None]:
    """Assert that the context takes less than `bound_s` seconds.

    On a slow or busy machine the limit grows in proportion.
    """
    before, began_s = slowness(time.monotonic), time.monotonic()
    yield
    took_s = time.monotonic() - began_s
    allowed_s = bound_s * max(before, slowness(time.monotonic))
    assert took_s < allowed_s, f"{took_s:.3f} s, where {allowed_s:.3f} s are allowed"


@contextmanager
def cpu_within(bound_s: float) -> Iterator[None]:
    """Assert that the context takes less than `bound_s` seconds of CPU time in this thread.

    On a slow machine the limit grows in proportion. The garbage collector is off meanwhile, since it would examine the
    objects of all tests.
    """
    before = slowness()
    gc.disable()
    try:
        began_s = time.thread_time()
        yield
        used_s = time.thread_time() - began_s
    finally:
        gc.enable()
    allowed_s = bound_s * max(before, slowness())
    assert used_s < allowed_s, f"{used_s:.3f} s of CPU time, where {allowed_s:.3f} s are allowed"


class Steps:
    """Awaitable that runs `work` and measures the CPU time of each step between two suspensions."""

    def __init__(self, work: Awaitable[Any]) -> None:
        self._work = work
        self.longest_s = 0.0
        self.sum_s = 0.0

    def __await__(self) -> Generator[Any, Any, None]:
        steps = self._work.__await__()
        while True:
            began_s = time.thread_time()
            try:
                pause = next(steps)
            except StopIteration:
                return
            finally:
                took_s = time.thread_time() - began_s
                self.longest_s, self.sum_s = max(self.longest_s, took_s), self.sum_s + took_s
            yield pause
