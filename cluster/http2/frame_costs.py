"""Costs of one client's frames: token buckets for resets, empty frames and header fields.

The unit of cost is one reset or refused call. An empty frame (WINDOW_UPDATE, PING, PRIORITY, empty DATA, unknown types
and so on) costs a fifth of a unit, unless bytes sent to the client justify the frame. A client that reads a stream
sends WINDOW_UPDATEs, and pings that measure the round trip, in proportion to the bytes that the client receives.
"""

from __future__ import annotations

from typing import Final

from cluster.http2.limits import ServerLimits

LIGHT: Final = 0.2
"""Cost of an empty frame, in units."""
BYTES_PER_FRAME: Final = 4
"""Number of payload bytes sent to the client that justify one empty frame. A token of 12 bytes justifies an update of
both windows and a ping. Single bytes, which a client can force by windows of one byte, justify too few frames."""
MAX_EARNED_BYTES: Final = 2_000_000
STREAMS_PER_UNIT: Final = 64
"""Number of open streams that add one unit to the cost of a SETTINGS frame, which is applied to every stream."""
CLIENT_FAULT: Final = 2.0
"""Cost of a call that failed by the client's fault: an invalid request, or a reset that the server had to send."""
UNAUTHENTICATED_PART: Final = 0.1
"""Part of a token bucket's rate and size that a connection without an admitted call gets."""


class Bucket:
    """A token bucket."""

    __slots__ = ("_at", "_burst", "_level", "_rate")

    def __init__(self, rate_per_s: float, burst: float, now: float) -> None:
        self._rate, self._burst = rate_per_s, burst
        self._level, self._at = burst, now

    def charge(self, amount: float, now: float) -> float:
        """Take `amount` from the bucket, even if the bucket holds less. Returns the new level, negative if too much was
        taken."""
        self._level = min(self._level + (now - self._at) * self._rate, self._burst) - amount
        self._at = now
        return self._level

    def delay_s(self) -> float:
        """Seconds until the level is no longer negative."""
        return max(-self._level / self._rate, 0.0)


class Charges:
    """The token buckets of one connection."""

    __slots__ = ("_fields", "_frames", "_limits", "delayed", "earned_bytes")

    def __init__(self, limits: ServerLimits, now: float) -> None:
        self._limits = limits
        self.earned_bytes = 0
        """Number of payload bytes sent to the client that have not yet justified an empty frame."""
        self.delayed = False
        """Whether the next frames must wait, because the client sent too many header fields."""
        self._frames = Bucket(
            limits.resets_per_s * UNAUTHENTICATED_PART, limits.resets_burst * UNAUTHENTICATED_PART, now
        )
        self._fields = Bucket(limits.unauthenticated_header_bytes_per_s, limits.unauthenticated_header_bytes_burst, now)

    def admit(self, now: float) -> None:
        """Replace the buckets by the full buckets of an authenticated connection."""
        limits = self._limits
        self._frames = Bucket(limits.resets_per_s, limits.resets_burst, now)
        self._fields = Bucket(limits.header_bytes_per_s, limits.header_bytes_burst, now)

    def justify_frame(self) -> bool:
        """Use up the sent bytes that justify one empty frame. Returns False if too few bytes were sent."""
        if self.earned_bytes < BYTES_PER_FRAME:
            return False
        self.earned_bytes = min(self.earned_bytes, MAX_EARNED_BYTES) - BYTES_PER_FRAME
        return True

    def charge_empty(self, now: float) -> bool:
        """Charge an empty frame. Returns False if the client exceeds the limit."""
        return self.justify_frame() or self._frames.charge(LIGHT, now) >= 0

    def charge(self, units: float, now: float) -> bool:
        """Charge a reset, a refused call or new settings. Returns False if the client exceeds the limit."""
        return self._frames.charge(units, now) >= 0

    def charge_fields(self, size: int, now: float) -> None:
        """Charge the header fields of a call."""
        self.delayed = self._fields.charge(size, now) < 0

    def delay_s(self) -> float:
        """Seconds for which the next frames must wait if `delayed` is true."""
        return self._fields.delay_s()
