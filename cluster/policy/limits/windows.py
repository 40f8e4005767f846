"""Sums of admitted requests and tokens: sliding one-minute sums, and sums of a day and of a month.

Problem: a counter that is reset each minute lets twice the limit pass around the reset, and a log of every admission
grows with the limit.

Method: admissions are summed in buckets of one second. A bucket counts until the *end* of the bucket is one window old.
So no window of WINDOW_S holds more than the limit. In return, an amount counts for up to one second too long.

Invariant: for any time t of an admission, the sum over (t - WINDOW_S, t] did not exceed the limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import UTC, datetime

WINDOW_S = 60
STEP_BACK_S = 60.0
"""Largest backward step of a clock, in seconds, that is waited out: readings stay constant until the clock catches up.
After a larger step, time continues at once from the last reading."""


class MonotonicClock:
    """Times that never decrease, made from the times of a clock that may step back."""

    def __init__(self) -> None:
        self._last = -math.inf
        self._offset = 0.0

    def read(self, now: float) -> float:
        """Return a monotonic reading for `now`, never less than the last reading. Raises ValueError if `now` is not
        finite."""
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
    """Sum of the amounts of the last WINDOW_S seconds. Callers must pass times that never decrease."""

    __slots__ = ("_amounts", "total")

    def __init__(self) -> None:
        self._amounts: dict[int, int] = {}
        """Amounts by bucket, the oldest bucket first."""
        self.total = 0

    def advance(self, now: float) -> None:
        """Drop the buckets that have expired at `now`."""
        oldest = math.floor(now) - WINDOW_S
        while self._amounts and (first := next(iter(self._amounts))) < oldest:
            self.total -= self._amounts.pop(first)

    def add(self, amount: int, now: float) -> int:
        """Add an amount to the current bucket. Returns the bucket's number, for a later `correct`."""
        bucket = math.floor(now)
        self._amounts[bucket] = self._amounts.get(bucket, 0) + amount
        self.total += amount
        return bucket

    def correct(self, bucket: int, amount: int) -> None:
        """Add `amount`, which may be negative, to a bucket. Does nothing if the bucket has expired."""
        if bucket in self._amounts:
            self._amounts[bucket] += amount
            self.total += amount

    def frees_in_s(self, amount: int, now: float) -> float:
        """Return the seconds until at least `amount` of the sum has expired. The result is at most WINDOW_S."""
        freed = 0
        for bucket, expiring in self._amounts.items():
            if freed >= amount:
                break
            freed += expiring
            last = bucket
        else:
            if freed < amount:
                return float(WINDOW_S)
        if amount <= 0:
            return 0.0
        return max(last + 1 + WINDOW_S - now, 0.0)

    def empties_in_s(self, now: float) -> float:
        """Seconds until the whole sum has expired."""
        for bucket, amount in reversed(self._amounts.items()):
            if amount:
                return max(bucket + 1 + WINDOW_S - now, 0.0)
        return 0.0

    def __repr__(self) -> str:
        return f"SlidingSum({self.total} in {len(self._amounts)} buckets)"


@dataclass(slots=True)
class Period:
    """Tokens used in one UTC day or month. `number`: serial number of the period, from `day_of` or `month_of`."""

    number: int = -1
    used: int = 0

    def advance(self, number: int) -> None:
        """Reset the use if `number` is a later period. An earlier number changes nothing."""
        if number > self.number:
            self.number, self.used = number, 0


def day_of(epoch_s: float) -> int:
    """Return the serial number of the UTC day of `epoch_s`, a time in seconds since the epoch."""
    return math.floor(epoch_s / 86_400)


def month_of(epoch_s: float) -> int:
    """Return the serial number of the UTC month of a time. `epoch_s`: the time in seconds since the epoch."""
    when = datetime.fromtimestamp(epoch_s, UTC)
    return when.year * 12 + when.month - 1


def day_ends_in_s(epoch_s: float) -> float:
    """Seconds until midnight, UTC."""
    return (day_of(epoch_s) + 1) * 86_400 - epoch_s


def month_ends_in_s(epoch_s: float) -> float:
    """Seconds until the first of the next month, UTC."""
    year, month = divmod(month_of(epoch_s) + 1, 12)
    return datetime(year, month + 1, 1, tzinfo=UTC).timestamp() - epoch_s


@dataclass(slots=True)
class TenantUse:
    """All sums of one tenant: one-minute windows, running calls, and the current day and month."""

    requests: SlidingSum = field(default_factory=SlidingSum)
    tokens: SlidingSum = field(default_factory=SlidingSum)
    second: int = -1
    """The second to which the windows are advanced."""
    running: int = 0
    day: Period = field(default_factory=Period)
    month: Period = field(default_factory=Period)

    def advance(self, now: float) -> None:
        """Drop the buckets that have expired at `now`. Buckets expire at whole seconds only."""
        second = math.floor(now)
        if second != self.second:
            self.second = second
            self.requests.advance(now)
            self.tokens.advance(now)
