"""Progress of a download of a model's weights. One thread writes, others read."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 10.0
"""Time in seconds over which the rate is measured."""
MIN_S = 1e-3
"""Minimum time in seconds that is assumed between two reports."""


class FetchProgress:
    """Progress of fetching a model's weights: bytes on this node, bytes in total, and the rate of the download."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()
        self.fetched_bytes = 0
        self.total_bytes = 0

    def report(self, fetched: int, total: int, _what: str = "") -> None:
        """Record the progress. This method can be used as a callback of type fetching.Progress."""
        now = self._clock()
        self.fetched_bytes, self.total_bytes = fetched, total
        self._seen.append((now, fetched))
        while len(self._seen) > 2 and self._seen[0][0] < now - WINDOW_S:
            self._seen.popleft()

    @property
    def bytes_per_s(self) -> float:
        """Mean rate over the last WINDOW_S seconds; 0 before the second report, and after WINDOW_S seconds without a
        report."""
        seen = list(self._seen)
        if len(seen) < 2 or seen[-1][0] < self._clock() - WINDOW_S:
            return 0.0
        (began, first), (ended, last) = seen[0], seen[-1]
        return max(last - first, 0) / max(ended - began, MIN_S) if ended > began else 0.0
