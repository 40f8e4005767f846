"""Time limits of one HTTP/1 connection: idle, request head, request body, and a response that the client does not read.

Problem: a connection that sends nothing, or one byte now and then, holds a descriptor and memory for as long as the
client likes.

Method: the connection reports its events with their times, and calls `overdue` every `check_s` seconds. The rate of a
body is measured between two checks, and only if the gateway was reading all the time, so that pauses of the gateway do
not count against the client.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


@dataclass(frozen=True, slots=True)
class TimeoutLimits:
    """Time limits in seconds for the parts of a request and its response, and the least rate at which a body must
    arrive."""

    check_s: float = 5.0
    """Seconds between two checks."""
    first_head_s: float = 10.0
    """Seconds from the start of the connection to the end of the first request's head."""
    head_s: float = 10.0
    """Seconds from the first byte of a later request to the end of that request's head."""
    keep_alive_s: float = 75.0
    """Idle seconds between requests. Longer than clients keep idle connections in their pools, so that no client writes
    to a connection that is being closed."""
    min_body_bytes_per_s: int = 4096
    leftover_s: float = 5.0
    """Seconds for the rest of a body after the request has been answered."""
    unread_s: float = 60.0
    """Seconds for which a client may leave a waiting response unread."""


class Part(Enum):
    """The part of a request or response that is in progress."""

    IDLE = auto()
    HEAD = auto()
    BODY = auto()
    ANSWER = auto()
    LEFTOVER = auto()


class Late(Enum):
    """The reason for closing a connection."""

    IDLE = "no request"
    HEAD = "the request's head did not end in time"
    BODY = "the request's body comes too slowly"
    LEFTOVER = "a refused body did not end in time"
    UNREAD = "the client does not read"


class HttpTimeouts:
    """The state of one connection, checked against the time limits."""

    __slots__ = ("_body_bytes", "_first", "_limits", "_part", "_paused", "_since", "_unread_bytes", "_unread_since")

    def __init__(self, limits: TimeoutLimits, now: float) -> None:
        self._limits = limits
        self._part = Part.IDLE
        self._since = now
        self._first = True
        self._body_bytes = 0
        self._paused = False
        self._unread_bytes: int | None = None
        self._unread_since = now

    def began_head(self, now: float) -> None:
        """Record the first byte of a request. Further calls before the head ends have no effect."""
        if self._part is Part.IDLE:
            self._part = Part.HEAD
            if not self._first:
                self._since = now

    def ended_head(self) -> None:
        """Record the end of a request's head."""
        self._part = Part.BODY
        self._first = False
        self._body_bytes = 0
        self._paused = True  # the time until the next check is shorter than check_s

    def body(self, size: int) -> None:
        """Record the receipt of `size` bytes of the request's body."""
        self._body_bytes += size

    def ended_body(self) -> None:
        """Record that the whole request, including its body, was received."""
        if self._part is not Part.IDLE:
            self._part = Part.ANSWER

    def paused(self) -> None:
        """Record that the gateway has paused reading since the last check."""
        self._paused = True

    def answered(self, now: float, *, complete: bool) -> None:
        """Record the end of the response. If the request's body has not arrived completely by then, `complete` is
        False, and the method is called again with True at the end of the body."""
        self._part = Part.IDLE if complete else Part.LEFTOVER
        self._since = now

    def overdue(self, now: float, unsent_bytes: int = 0) -> Late | None:
        """Return the reason for closing the connection now; None if no limit is exceeded. `unsent_bytes`: number of
        bytes that the client has not read."""
        if self._unread(now, unsent_bytes):
            return Late.UNREAD
        waited, limits = now - self._since, self._limits
        match self._part:
            case Part.IDLE:
                return Late.IDLE if waited > (limits.first_head_s if self._first else limits.keep_alive_s) else None
            case Part.HEAD:
                return Late.HEAD if waited > limits.head_s else None
            case Part.LEFTOVER:
                return Late.LEFTOVER if waited > limits.leftover_s else None
            case Part.BODY:
                slow = not self._paused and self._body_bytes < limits.min_body_bytes_per_s * limits.check_s
                self._body_bytes, self._paused = 0, False
                return Late.BODY if slow else None
            case Part.ANSWER:
                return None

    def _unread(self, now: float, unsent_bytes: int) -> bool:
        if not unsent_bytes or unsent_bytes != self._unread_bytes:
            self._unread_bytes = unsent_bytes
            self._unread_since = now
            return False
        return now - self._unread_since > self._limits.unread_s
