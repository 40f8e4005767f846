"""Functions for long lists in an answer. The items of a list are made in slices of time, so that other tasks of the
event loop run in between."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final, TypeVar

SLICE_S: Final = 0.002
"""Seconds for which items are made before other tasks of the event loop run."""
_T = TypeVar("_T")


async def in_slices(items: Iterable[_T]) -> list[_T]:
    """Return the items as a list. Other tasks of the event loop run every SLICE_S seconds while the items are made."""
    loop = asyncio.get_running_loop()
    out: list[_T] = []
    until = loop.time() + SLICE_S
    for item in items:
        out.append(item)
        if loop.time() >= until:
            await asyncio.sleep(0)
            until = loop.time() + SLICE_S
    return out


def with_commas(items: list[bytes]) -> list[bytes | bytearray]:
    """Return JSON values with commas between them, as parts of an answer."""
    out: list[bytes | bytearray] = [b","] * max(2 * len(items) - 1, 0)
    out[::2] = items
    return out
