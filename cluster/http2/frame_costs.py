"""What the frames of one client cost it: token buckets for resets, frames that carry nothing, and header fields.

A unit is one reset or refused call. Frames that carry nothing (WINDOW_UPDATE, PING, PRIORITY, empty DATA, unknown ones
and so on) cost a fifth of it, unless what was sent to the client justifies them: a client that reads a stream sends
WINDOW_UPDATEs, and pings that measure the round trip, in proportion to what it receives.
"""

from __future__ import annotations

from typing import Final

from cluster.http2.limits import ServerLimits

LIGHT: Final = 0.2
"""Cost of a frame that carries nothing."""
BYTES_PER_FRAME: Final = 4
"""Payload sent to the client that justifies one frame of it: a token of 12 bytes or more justifies an update of both
windows and a ping. Sending single bytes, which a client can enforce by windows of one byte, justifies too little."""
MOST_EARNED_BYTES: Final = 2_000_000
STREAMS_PER_UNIT: Final = 64
"""A SETTINGS frame is applied to every stream: so many of them cost a unit."""
WRONG: Final = 2.0
"""Cost of a call that the client made fail: no valid request, or a reset that the server had to send."""
STRANGER: Final = 0.1
"""A connection without an admitted call has this part of the bucket."""


class Bucket:
    """A token bucket."""

    __slots__ = ("_at", "_burst", "_level", "_rate")

    def __init__(self, rate_per_s: float, burst: float, now: float) -> None:
        self._rate, self._burst = rate_per_s, burst
        self._level, self._at = burst, now

    def take(self, amount: float, now: float) -> float:
        """Take an amount, even beyond what is there; how much is left, negative where too much was taken."""
        self._level = min(self._level + (now - self._at) * self._rate, self._burst) - amount
        self._at = now
        return self._level

    def delay_s(self) -> float:
        """How long until nothing is owed any more."""
        return max(-self._level / self._rate, 0.0)


class Charges:
    """The buckets of one connection."""

    __slots__ = ("_fields", "_frames", "_limits", "delayed", "earned_bytes")

    def __init__(self, limits: ServerLimits, now: float) -> None:
        self._limits = limits
        self.earned_bytes = 0
        """Payload of calls that was sent to the client and has justified no frame yet."""
        self.delayed = False
        """Whether the connection's next frames are to wait, since its header fields were too many."""
        self._frames = Bucket(limits.resets_per_s * STRANGER, limits.resets_burst * STRANGER, now)
        self._fields = Bucket(limits.stranger_header_bytes_per_s, limits.stranger_header_bytes_burst, now)

    def admit(self, now: float) -> None:
        """A call of the connection was admitted: the whole buckets, full."""
        limits = self._limits
        self._frames = Bucket(limits.resets_per_s, limits.resets_burst, now)
        self._fields = Bucket(limits.header_bytes_per_s, limits.header_bytes_burst, now)

    def justified(self) -> bool:
        """Whether what was sent to the client pays for a frame that carries nothing."""
        if self.earned_bytes < BYTES_PER_FRAME:
            return False
        self.earned_bytes = min(self.earned_bytes, MOST_EARNED_BYTES) - BYTES_PER_FRAME
        return True

    def light(self, now: float) -> bool:
        """A frame that carries nothing; whether the client may send it."""
        return self.justified() or self._frames.take(LIGHT, now) >= 0

    def heavy(self, units: float, now: float) -> bool:
        """A reset, a refused call or new settings; whether the client may send it."""
        return self._frames.take(units, now) >= 0

    def fields(self, size: int, now: float) -> None:
        """Header fields of a call."""
        self.delayed = self._fields.take(size, now) < 0

    def delay_s(self) -> float:
        """How long the next frames are to wait, where they are delayed."""
        return self._fields.delay_s()
