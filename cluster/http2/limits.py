"""Limits for one client of a Server, and the token buckets that charge the client's frames.

The unit of cost is one reset or refused call. An empty frame (WINDOW_UPDATE, PING, PRIORITY, empty DATA, unknown types
and so on) costs a fifth of a unit. It costs nothing if enough bytes were sent to the client: a client that reads a
stream sends WINDOW_UPDATEs, and pings that measure the round trip, in proportion to the bytes that it receives.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final, Protocol

FIRST_WINDOW_BYTES: Final = 65_535
"""Receive window in bytes that HTTP/2 prescribes until the server has sent another window size."""
LIGHT: Final = 0.2
"""Cost of an empty frame, in units."""
BYTES_PER_FRAME: Final = 4
"""Number of payload bytes sent to the client that justify one empty frame. A token of 12 bytes justifies an update of
both windows and a ping. A client that opens its window one byte at a time receives too few bytes to justify frames."""
UNREAD_STEP: Final = 4096
"""Number of bytes that count as progress of a client that reads an answer slowly."""
MAX_EARNED_BYTES: Final = 2_000_000
STREAMS_PER_UNIT: Final = 64
"""Number of open streams that add one unit to the cost of a SETTINGS frame, which is applied to every stream."""
CLIENT_FAULT: Final = 2.0
"""Cost of a call that failed by the client's fault: an invalid request, or a reset that the server had to send."""
UNAUTHENTICATED_PART: Final = 0.1
"""Part of a token bucket's rate and size that a connection without an admitted call gets."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Limits for one client, in seconds and bytes."""

    max_message_bytes: int = 16 << 20
    max_calls: int = 4096
    """Maximum number of concurrent calls on one connection; the client delays further calls."""
    unauthenticated_calls: int = 100
    """Maximum number of concurrent calls on a connection without an admitted call; HTTP/2 recommends at least 100."""
    anonymous_calls: int = 8
    """Maximum number of concurrent calls on one connection to methods that need no credential."""
    max_header_bytes: int = 65_536
    header_bytes_per_s: float = 4 << 20
    header_bytes_burst: float = 16 << 20
    """`header_bytes_per_s` and `header_bytes_burst`: rate and size of a token bucket for decoded header fields. Reading
    waits while the bucket is empty."""
    unauthenticated_header_bytes_per_s: float = 65_536
    unauthenticated_header_bytes_burst: float = 256 << 10
    window_bytes: int = FIRST_WINDOW_BYTES
    """Maximum number of unread request bytes of one call that no reservation covers."""
    connection_window_bytes: int = 1 << 20
    """Receive window in bytes that all calls of a connection share, after a call of the connection was admitted."""
    frame_bytes: int = 65_536
    hello_s: float = 20.0
    """Time limit for the client's preface and settings, and idle limit of a connection without an admitted call."""
    frame_s: float = 20.0
    """Time limit to complete a frame or header block."""
    idle_s: float = 300.0
    """Time without calls after which a connection gets a GOAWAY and is closed."""
    request_s: float = 120.0
    """Time limit to send the request of a call that takes one request message."""
    ping_s: float = 60.0
    ping_answer_s: float = 20.0
    resets_per_s: float = 1000.0
    resets_burst: float = 5000.0
    """`resets_per_s` and `resets_burst`: rate and size of a connection's token bucket for resets and refused calls. An
    empty frame costs a fifth of a reset. A connection whose bucket is empty is closed (rapid reset). A connection
    without an admitted call has a tenth of the rate and size."""
    max_unsent_bytes: int = 64 << 20
    """Maximum number of bytes that wait for a client that reads nothing. A client beyond it loses its connection. The
    bytes in the socket's buffer are limited to as many, whether the client reads or not."""
    unread_s: float = 60.0
    """Time in which a client must read UNREAD_STEP bytes of an answer that waits for it, or all of it. Otherwise the
    call is reset."""
    age_s: float = 0.0
    """Age in seconds at which the server asks the client to reconnect; 0: never."""
    age_grace_s: float = 300.0
    """Time in seconds after the age limit at which the server ends the calls whose client may still send requests. All
    other calls may finish."""


class BodyReservation(Protocol):
    """The bytes of one message, reserved in the budget of request bytes."""

    @property
    def granted(self) -> bool:
        """Whether the bytes may be received now."""

    def received(self, size: int) -> None:
        """Count `size` bytes of the message that have arrived after the reservation was granted."""

    def complete(self) -> None:
        """Record that all bytes have arrived."""

    def shrink(self, size: int) -> None:
        """Return all but `size` bytes to the budget."""

    def release(self) -> None:
        """Return the bytes to the budget. Idempotent."""


class Budget(Protocol):
    """A limit on the bytes of all requests that are being received. The bytes of each request are reserved."""

    def full(self, tenant: str) -> bool:
        """Return whether to refuse a further request of this tenant, because too many of the tenant's requests already
        wait for the budget."""

    def reserve(
        self, tenant: str, connection: Hashable, size: int, on_grant: Callable[[], None], too_slow: Callable[[], None]
    ) -> BodyReservation:
        """Reserve `size` bytes for a request. If the bytes are granted later, `on_grant` is called. If the bytes arrive
        too slowly after the grant, `too_slow` is called."""


class Bucket:
    """A token bucket."""

    __slots__ = ("_at", "_burst", "_level", "_rate")

    def __init__(self, rate_per_s: float, burst: float, now: float) -> None:
        self._rate, self._burst = rate_per_s, burst
        self._level, self._at = burst, now

    def charge(self, amount: float, now: float) -> float:
        """Take `amount` from the bucket. Returns the new level, which is negative if the bucket held less than
        `amount`."""
        self._level = min(self._level + (now - self._at) * self._rate, self._burst) - amount
        self._at = now
        return self._level

    def delay_s(self) -> float:
        """Return the seconds until the bucket's level is no longer negative; 0 if it is not negative."""
        return max(-self._level / self._rate, 0.0)


class SentBytes(Protocol):
    """The count of the bytes that were sent to a client."""

    payload_bytes: int


class Charges:
    """The token buckets to which the frames of one connection are charged."""

    __slots__ = ("_fields", "_frames", "_limits", "_sent", "_used_bytes", "delayed")

    def __init__(self, limits: ServerLimits, sent: SentBytes, now: float) -> None:
        self._limits = limits
        self._sent = sent
        self._used_bytes = 0
        """Number of sent payload bytes that have already justified an empty frame."""
        self.delayed = False
        """Whether the next frames must wait, because the client sent too many header fields."""
        self._frames = Bucket(
            limits.resets_per_s * UNAUTHENTICATED_PART, limits.resets_burst * UNAUTHENTICATED_PART, now
        )
        self._fields = Bucket(limits.unauthenticated_header_bytes_per_s, limits.unauthenticated_header_bytes_burst, now)

    def admit(self, now: float) -> None:
        """Replace the token buckets with the larger ones of an authenticated connection. The new buckets begin full."""
        limits = self._limits
        self._frames = Bucket(limits.resets_per_s, limits.resets_burst, now)
        self._fields = Bucket(limits.header_bytes_per_s, limits.header_bytes_burst, now)

    def justify_frame(self) -> bool:
        """Accept one empty frame free of charge, in exchange for payload bytes that were sent to the client. Returns
        False if too few bytes were sent."""
        sent = self._sent.payload_bytes
        if sent - self._used_bytes < BYTES_PER_FRAME:
            return False
        self._used_bytes = max(self._used_bytes, sent - MAX_EARNED_BYTES) + BYTES_PER_FRAME
        return True

    def charge_empty(self, now: float) -> bool:
        """Charge an empty frame. Returns False if the client exceeds its limit."""
        return self.justify_frame() or self._frames.charge(LIGHT, now) >= 0

    def charge(self, units: float, now: float) -> bool:
        """Charge `units` for a reset, a refused call or new settings. Returns False if the client exceeds its limit."""
        return self._frames.charge(units, now) >= 0

    def charge_fields(self, size: int, now: float) -> None:
        """Charge `size` bytes of header fields of a call. Sets `delayed` if the client exceeds its limit."""
        self.delayed = self._fields.charge(size, now) < 0

    def delay_s(self) -> float:
        """Seconds for which the next frames must wait if `delayed` is true."""
        return self._fields.delay_s()
