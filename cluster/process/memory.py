"""Memory of a long-running process: exclude permanent objects from garbage collection, and return free pages.

Python's garbage collector stops all threads while it walks objects. By default it walks the young objects after every
700 new objects, which a hundred calls create. Now and then it walks all objects, including modules, tokenizers and
tables that live as long as the process. In a gateway with 256 streams, one such walk took 30 ms. So the objects that
exist after a start or a load are frozen (never walked again), and young objects are walked less often. Objects of ended
calls are freed by reference counting, except for rare cycles.

glibc keeps freed memory between pieces that are in use. In an hour of 100 calls a second, such holes grew by 3 MB in a
gateway, although its objects in use did not grow. So whole free pages are returned to the system now and then, when no
calls are running.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

YOUNG_THRESHOLD = 10_000
"""Number of new objects that start a collection; walking this many objects takes about a millisecond."""
INTERVAL_S, FIRST_S, CHECK_S = 60.0, 5.0, 0.5


def freeze_objects() -> None:
    """Exclude all current objects from later garbage collections, and collect less often. Call this function after the
    process has started, or after it has loaded something permanent."""
    gc.freeze()
    gc.set_threshold(YOUNG_THRESHOLD, 50, 10)
    gc.enable()


def return_free_pages() -> bool:
    """Return free heap pages to the operating system, which takes some milliseconds for tens of megabytes. Returns
    False if the C library is not glibc."""
    import ctypes  # not at import: ctypes is needed only after the start

    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # the C library is not glibc
        return False
    trim.argtypes, trim.restype = (ctypes.c_size_t,), ctypes.c_int
    trim(0)
    return True


async def keep_returning_free_pages(
    idle: Callable[[], bool],
    every_s: float = INTERVAL_S,
    check_s: float = CHECK_S,
    give: Callable[[], bool] = return_free_pages,
) -> None:
    """Return free pages to the operating system about every `every_s` seconds, for the first time soon after the call.

    Allocations in all threads wait while pages are returned. So the coroutine calls `idle` every `check_s` seconds, and
    returns pages only when `idle` returns True. `give`: the function that returns the pages. The coroutine ends only if
    `give` returns False, because the C library is not glibc.
    """
    due = time.monotonic() + min(every_s, FIRST_S)
    while True:
        await asyncio.sleep(check_s)
        if time.monotonic() < due or not idle():
            continue
        if not give():
            return
        due = time.monotonic() + every_s
