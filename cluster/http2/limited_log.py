"""A rate-limited log of refused connections: at most one line a second, with the number of connections by reason."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Final

import structlog

log = structlog.get_logger("connections")

INTERVAL_S: Final = 1.0


class LimitedLog:
    """A log that counts events by reason and writes all counts in one line, at most once a second."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._next_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def count(self, reason: str) -> None:
        """Count one event under `reason`; all counts are logged at most once a second."""
        self._counts[reason] += 1
        if self._timer is not None:
            return
        loop = asyncio.get_running_loop()
        wait_s = self._next_at - loop.time()
        if wait_s <= 0:
            self._write()
        else:
            self._timer = loop.call_later(wait_s, self._write)

    def _write(self) -> None:
        self._timer = None
        self._next_at = asyncio.get_running_loop().time() + INTERVAL_S
        counts, self._counts = self._counts, Counter()
        log.warning("connections_refused", **counts)
