"""Counts of recent calls by cached prefix.

Problem: if many calls share a prefix that one worker holds, this worker has the lowest cost for all of them and becomes
a hot spot. Another worker would have to compute the prefix only once to serve many of the calls.

Method: each prefix has a count of its calls, which falls to 1/e within MEMORY_S. The cost of computing the prefix
elsewhere is divided by one plus the count, see cost.py. Memory is bounded: the least recently sent prefixes are
forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from math import exp
from typing import Final

MEMORY_S: Final = 30.0
"""Time in which a count falls to 1/e."""
MAX_PREFIXES: Final = 4096


class HotPrefixes:
    """Counts of recent calls by prefix. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._counts: OrderedDict[int, tuple[float, float]] = OrderedDict()
        """Count of each prefix, and time at which the count was computed, keyed by the hash of the prefix."""

    def __len__(self) -> int:
        return len(self._counts)

    def recent(self, prefix: int, now: float) -> float:
        """Return the number of recent calls that were sent with a prefix. Older calls count less."""
        count, at = self._counts.get(prefix, (0.0, now))
        return count * exp(min(at - now, 0.0) / MEMORY_S)

    def record(self, prefix: int, now: float) -> None:
        """Record that a call with this prefix was sent."""
        self._counts[prefix] = (self.recent(prefix, now) + 1, now)
        self._counts.move_to_end(prefix)
        if len(self._counts) > MAX_PREFIXES:
            self._counts.popitem(last=False)
