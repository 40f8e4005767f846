"""What was admitted in the last minute, and in this day and month, so that a limit holds in any window whatever.

Problem: a counter that is reset each minute lets twice the limit pass around the reset; a log of every admission grows
with the limit. So admissions are summed in buckets of one second, and a bucket counts until its *end* is a window old:
no window of WINDOW_S holds more than the limit, at the price of one part in sixty.
Invariant: for any t, what was admitted in (t - WINDOW_S, t] never exceeded the limit when something was admitted at t.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime

WINDOW_S = 60
STEP_BACK_S = 60.0
"""A clock that goes back by less stands still until it is there again; by more, it goes on from where it was."""


class Steady:
    """A clock's readings made not to go back."""

    def __init__(self) -> None:
        self._last = -math.inf
        self._offset = 0.0

    def read(self, now: float) -> float:
        """`now`, or the latest before it. Raises ValueError for what is no time."""
        if not math.isfinite(now):
            raise ValueError(f"now must be finite, not {now!r}")
        steady = now + self._offset
        if steady < self._last:
            if self._last - steady > STEP_BACK_S:
                self._offset += self._last - steady
            return self._last
        self._last = steady
        return steady


class SlidingSum:
    """Amounts of the last WINDOW_S seconds. Callers pass times that do not go back."""

    __slots__ = ("_amounts", "_buckets", "total")

    def __init__(self) -> None:
        self._buckets: deque[int] = deque()
        self._amounts: dict[int, int] = {}
        self.total = 0

    def advance(self, now: float) -> None:
        """Drop what is over."""
        oldest = math.floor(now) - WINDOW_S
        while self._buckets and self._buckets[0] < oldest:
            self.total -= self._amounts.pop(self._buckets.popleft())

    def add(self, amount: int, now: float) -> int:
        """Count it; the number of the bucket it is in, for `correct`."""
        bucket = math.floor(now)
        if bucket not in self._amounts:
            self._buckets.append(bucket)
            self._amounts[bucket] = 0
        self._amounts[bucket] += amount
        self.total += amount
        return bucket

    def correct(self, bucket: int, amount: int) -> None:
        """Change what was counted then; nothing if that is over."""
        if bucket in self._amounts:
            self._amounts[bucket] += amount
            self.total += amount

    def frees_in_s(self, amount: int, now: float) -> float:
        """How long until `amount` of what is in it is over; at most the window."""
        freed = 0
        for bucket in self._buckets:
            if freed >= amount:
                break
            freed += self._amounts[bucket]
            last = bucket
        else:
            if freed < amount:
                return float(WINDOW_S)
        if amount <= 0:
            return 0.0
        return max(last + 1 + WINDOW_S - now, 0.0)

    def empties_in_s(self, now: float) -> float:
        """How long until all that is in it is over."""
        for bucket in reversed(self._buckets):
            if self._amounts[bucket]:
                return max(bucket + 1 + WINDOW_S - now, 0.0)
        return 0.0

    def __repr__(self) -> str:
        return f"SlidingSum({self.total} in {len(self._amounts)} buckets)"


@dataclass(slots=True)
class Period:
    """What was used in a day or a month of UTC. `number` grows by one each."""

    number: int = -1
    used: int = 0

    def advance(self, number: int) -> None:
        """Begin anew in a later one; a clock that goes back changes nothing."""
        if number > self.number:
            self.number, self.used = number, 0


def day_of(epoch_s: float) -> int:
    """Its number."""
    return math.floor(epoch_s / 86_400)


def month_of(epoch_s: float) -> int:
    """Its number."""
    when = datetime.fromtimestamp(epoch_s, UTC)
    return when.year * 12 + when.month - 1


def day_ends_in_s(epoch_s: float) -> float:
    """Until midnight, UTC."""
    return (day_of(epoch_s) + 1) * 86_400 - epoch_s


def month_ends_in_s(epoch_s: float) -> float:
    """Until the first of the next month, UTC."""
    year, month = divmod(month_of(epoch_s) + 1, 12)
    return datetime(year, month + 1, 1, tzinfo=UTC).timestamp() - epoch_s


@dataclass(slots=True)
class TenantUse:
    """All sums of one tenant."""

    requests: SlidingSum = field(default_factory=SlidingSum)
    tokens: SlidingSum = field(default_factory=SlidingSum)
    running: int = 0
    day: Period = field(default_factory=Period)
    month: Period = field(default_factory=Period)
