"""Memory of a process that runs for months: the garbage collector told what stays, and free pages given back.

A collection holds the interpreter for as long as it walks.

CPython's own setting looks at every 700 further objects, which a hundred calls make, and now and then at all that
were ever made: modules, tokenizers and tables that live as long as the process. In a gateway with 256 streams that was
30 ms in one piece. What a start or a load has made is frozen instead, and the young are looked at more rarely; what
calls leave is freed without the collector, but for the rare cycle.

glibc keeps what is freed between pieces that are not. In an hour of 100 calls a second a gateway that held as much as
before (as many objects, as many bytes in use) had grown by 3 MB in such holes; whole pages of them go back now and
then, in a moment without calls.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

YOUNG_OBJECTS = 10_000
"""Of so many new ones a look takes about a millisecond."""
GIVE_BACK_S, FIRST_S, LOOK_S = 60.0, 5.0, 0.5


def settle() -> None:
    """What there is now stays: no collection walks over it again. For the end of a start or of a load."""
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 50, 10)
    gc.enable()


def give_back() -> bool:
    """Pages that are free inside the heap go back to the system; False where the C library cannot do that. Takes some
    milliseconds for tens of megabytes."""
    import ctypes  # not before the process serves

    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # not glibc
        return False
    trim.argtypes, trim.restype = (ctypes.c_size_t,), ctypes.c_int
    trim(0)
    return True


async def give_back_now_and_then(
    idle: Callable[[], bool],
    every_s: float = GIVE_BACK_S,
    look_s: float = LOOK_S,
    give: Callable[[], bool] = give_back,
) -> None:
    """Every so often, at the next moment that is idle: on any thread, whoever wants memory meanwhile would wait. Until
    cancelled, or for good where it cannot be done; the first time soon after a start."""
    due = time.monotonic() + min(every_s, FIRST_S)
    while True:
        await asyncio.sleep(look_s)
        if time.monotonic() < due or not idle():
            continue
        if not give():
            return
        due = time.monotonic() + every_s
