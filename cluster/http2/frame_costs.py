"""Costs of one client's frames: token buckets for resets, empty frames and header fields.

The unit is one reset or refused call. Empty frames (WINDOW_UPDATE, PING, PRIORITY, empty DATA, unknown types and so on)
cost a fifth of it, unless bytes sent to the client justify them: a client that reads a stream sends WINDOW_UPDATEs, and
pings that measure the round trip, in proportion to what it receives.
"""

from __future__ import annotations

from typing import Final

from cluster.http2.limits import ServerLimits

LIGHT: Final = 0.2
"""Cost of an empty frame."""
BYTES_PER_FRAME: Final = 4
"""Payload bytes sent to the client that justify one empty frame: a token of 12 bytes justifies an update of both
windows and a ping. Single bytes, which a client can force by windows of one byte, justify too few."""
MAX_EARNED_BYTES: Final = 2_000_000
STREAMS_PER_UNIT: Final = 64
"""Streams per cost unit of a SETTINGS frame, which is applied to every stream."""
CLIENT_FAULT: Final = 2.0
"""Cost of a call that the client made fail: an invalid request, or a reset that the server had to send."""
UNAUTHENTICATED_PART: Final = 0.1
"""Part of the bucket for a connection that has no admitted call."""


class Bucket:
    """A token bucket."""

    __slots__ = ("_at", "_burst", "_level", "_rate")

    def __init__(self, rate_per_s: float, burst: float, now: float) -> None:
        self._rate, self._burst = rate_per_s, burst
        self._level, self._at = burst, now

    def charge(self, amount: float, now: float) -> float:
        """Take an amount, even more than the bucket holds. Returns the new level, negative if too much was taken."""
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
        """Payload bytes sent to the client that have not justified a frame yet."""
        self.delayed = False
        """Whether the next frames must wait because of too many header fields."""
        self._frames = Bucket(
            limits.resets_per_s * UNAUTHENTICATED_PART, limits.resets_burst * UNAUTHENTICATED_PART, now
        )
        self._fields = Bucket(limits.unauthenticated_header_bytes_per_s, limits.unauthenticated_header_bytes_burst, now)

    def admit(self, now: float) -> None:
        """Replace the buckets by full ones of an authenticated connection."""
        limits = self._limits
        self._frames = Bucket(limits.resets_per_s, limits.resets_burst, now)
        self._fields = Bucket(limits.header_bytes_per_s, limits.header_bytes_burst, now)

    def justify_frame(self) -> bool:
        """Take the sent bytes that justify one empty frame; False if there are too few."""
        if self.earned_bytes < BYTES_PER_FRAME:
            return False
        self.earned_bytes = min(self.earned_bytes, MAX_EARNED_BYTES) - BYTES_PER_FRAME
        return True

    def charge_empty(self, now: float) -> bool:
        """Charge an empty frame; False if the client exceeds its limit."""
        return self.justify_frame() or self._frames.charge(LIGHT, now) >= 0

    def charge(self, units: float, now: float) -> bool:
        """Charge a reset, a refused call or new settings; False if the client exceeds its limit."""
        return self._frames.charge(units, now) >= 0

    def charge_fields(self, size: int, now: float) -> None:
        """Charge the header fields of a call."""
        self.delayed = self._fields.charge(size, now) < 0

    def delay_s(self) -> float:
        """Seconds that the next frames must wait if `delayed`."""
        return self._fields.delay_s()
