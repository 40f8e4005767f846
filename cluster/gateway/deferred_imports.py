"""Modules that only large requests need and that a gateway therefore imports after its start.

Importing numpy takes about 60 ms, and msgspec and orjson 10 ms. Together that is a twentieth of a gateway's start. The
modules are usually imported before the first large request arrives. If a large request arrives earlier, the code that
handles it imports them. A new gateway whose workers already hold KV blocks needs the modules at once, to index the
blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import time
from collections.abc import Callable
from typing import Final

MODULES: Final = ("numpy", "msgspec", "orjson")
AFTER_S, AT_LATEST_S, LOOK_S = 1.0, 10.0, 0.1


async def import_later(
    idle: Callable[[], bool],
    needed: asyncio.Event,
    after_s: float = AFTER_S,
    at_latest_s: float = AT_LATEST_S,
) -> None:
    """Import MODULES in a thread. The import starts as soon as `needed` is set. Without `needed`, it starts once
    `after_s` seconds have passed and `idle()` is true, but after `at_latest_s` seconds even if `idle()` is
    false.

    An import during a call would delay the call, because loading native code holds the GIL for about 15 ms.
    """
    latest, wait_s = time.monotonic() + at_latest_s, after_s
    while not needed.is_set():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await needed.wait()
        wait_s = LOOK_S
        if idle() or time.monotonic() >= latest:
            break
    for name in MODULES:
        await asyncio.to_thread(importlib.import_module, name)
