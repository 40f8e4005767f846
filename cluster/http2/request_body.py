"""The messages of one call's request on their way in: assembled, reserved in the budget, and waiting to be read.

Flow control follows the budget. A call may send `window_bytes` of a message; for the rest of it the message's whole
size is reserved first (policy/limits/request_bytes.py), and then the window is opened for exactly that. So a message
that has its reservation can always be completed, and bytes without one are at most a window each.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cluster.http2.messages import PREFIX_BYTES, Assembler, BadMessage

if TYPE_CHECKING:
    from cluster.http2.connection import Connection


class BodyReservation(Protocol):
    """Bytes of one message in a budget."""

    @property
    def granted(self) -> bool:
        """Whether they may be received now."""

    def received(self, size: int) -> None:
        """Count bytes that came since the grant."""

    def complete(self) -> None:
        """All have come."""

    def shrink(self, size: int) -> None:
        """Keep only so many bytes."""

    def release(self) -> None:
        """Give the bytes back. Idempotent."""


class Budget(Protocol):
    """What request bytes are reserved in."""

    def full(self, tenant: str) -> bool:
        """Whether too many wait to add one."""

    def reserve(
        self,
        tenant: str,
        connection: Hashable,
        size: int,
        on_grant: Callable[[], None],
        too_slow: Callable[[], None],
    ) -> BodyReservation:
        """Ask for so many bytes; `on_grant` is called if they are not granted at once."""


@dataclass(slots=True)
class Received:
    """A whole message, as it was sent."""

    data: bytes | bytearray
    on_wire: int
    compressed: bool
    reservation: BodyReservation | None


class RequestBody:
    """One call's messages. `streaming`: several are expected, each of which the handler reads."""

    __slots__ = (
        "_assembler",
        "_connection",
        "_decided",
        "_inbox",
        "_on_connection",
        "_on_stream",
        "_reservation",
        "_size",
        "_stream_id",
        "_tenant",
        "_too_slow",
        "_unread",
        "_whole",
        "began_at",
        "streaming",
    )

    def __init__(self, connection: Connection, stream_id: int, too_slow: Callable[[], None]) -> None:
        self.streaming = False
        self.began_at = math.inf
        """When the message under way was let in."""
        self._connection = connection
        self._stream_id = stream_id
        self._assembler = Assembler(connection.limits.max_message_bytes)
        self._inbox: deque[Received] = deque()
        self._tenant: str | None = None
        self._decided = self._whole = False
        self._too_slow = too_slow
        self._reservation: BodyReservation | None = None
        self._size = 0
        """Of the message under way with its prefix, once the rest of it was let in; else 0."""
        self._on_stream = 0
        """Bytes that the stream's window is to get back."""
        self._on_connection = 0
        """Bytes received that the connection's window has not got back."""
        self._unread = 0
        """Bytes of whole messages that no reservation covers and no handler has read."""

    def __len__(self) -> int:
        return len(self._inbox)

    def admit(self, tenant: str | None) -> None:
        """Who calls is known. None: a method that anybody may call. Raises BadMessage."""
        self._tenant, self._decided = tenant, True
        self.settle()

    def add(self, data: bytes, size: int) -> None:
        """Bytes of the client, `size` with padding. Raises BadMessage."""
        self._on_connection += size
        self._on_stream += size - len(data)  # padding, of which nothing is kept
        if self._reservation is not None:
            self._reservation.received(len(data))
        for message, on_wire, compressed in self._assembler.add(data):
            self._completed(message, on_wire, compressed)
        if self._whole and not self.streaming and (len(self._inbox) > 1 or self._assembler.held_bytes):
            raise BadMessage("this method takes exactly one request message")
        self.settle()

    def _completed(self, message: bytes | bytearray, on_wire: int, compressed: bool) -> None:
        reservation, self._reservation, self._size = self._reservation, None, 0
        self.began_at = math.inf
        if reservation is not None:
            reservation.complete()
        else:
            self._unread += on_wire
        self._inbox.append(Received(message, on_wire, compressed, reservation))
        self._whole = True

    def pop(self) -> Received:
        """The next message. Its reservation is the caller's to release."""
        received = self._inbox.popleft()
        if self.streaming:
            if received.reservation is None:
                self._unread -= received.on_wire
            self._on_stream += min(received.on_wire, self._connection.limits.window_bytes)
            self.settle()
        return received

    def close(self) -> None:
        """Drop everything."""
        if self._reservation is not None:
            self._reservation.release()
            self._reservation = None
        for one in self._inbox:
            if one.reservation is not None:
                one.reservation.release()
        self._inbox.clear()
        self._assembler.clear()
        self._give_connection(self._on_connection)

    def settle(self) -> None:
        """Reserve what has begun and is not complete, and open the windows as far as that goes. Raises BadMessage."""
        if not self._size and self._assembler.held_bytes:
            self._begin()
        self.settle_connection()
        if self._on_stream:
            self._give_stream()

    def settle_connection(self) -> None:
        """Give the connection's window back what no handler has to read first."""
        if self._connection.admitted:
            self._give_connection(self._on_connection - (self._unread if self.streaming else 0))

    def _begin(self) -> None:
        """Let in the rest of a message whose prefix has come."""
        size, budget, limits = self._assembler.message_bytes, self._connection.budget, self._connection.limits
        if not size or not self._decided:
            return
        self.began_at = self._connection.loop.time()
        if budget is None:
            self._size = size
            self._open()
        elif self._tenant is not None:
            self._size = size
            self._reserve(budget, self._tenant)
        elif size > limits.window_bytes:
            most = limits.window_bytes - PREFIX_BYTES
            raise BadMessage(
                f"the message of {size - PREFIX_BYTES} bytes is larger than {most}, the most that is taken without a "
                "credential",
                too_large=True,
            )

    def _reserve(self, budget: Budget, tenant: str) -> None:
        if budget.full(tenant):
            message = "too many requests are being received at once; send fewer, or send this one again later"
            raise BadMessage(message, too_large=True)
        size = self._size
        if self._assembler.compressed:  # what it decompresses to is not known, and two steps could deadlock
            size += self._connection.limits.max_message_bytes
        self._reservation = budget.reserve(tenant, self._connection, size, self._open, self._too_slow)
        if self._reservation.granted:
            self._open()

    def _open(self) -> None:
        self._on_stream += max(self._size - self._connection.limits.window_bytes, 0)
        self._give_stream(at_once=True)

    def _give_stream(self, at_once: bool = False) -> None:
        at_once = at_once or self._size > 0  # the rest of a message must not wait for half a window
        if self._on_stream and (at_once or self._on_stream >= self._connection.limits.window_bytes // 2):
            size, self._on_stream = self._on_stream, 0
            self._connection.give(size, self._stream_id)

    def _give_connection(self, size: int) -> None:
        size = min(size, self._on_connection)
        if size > 0:
            self._on_connection -= size
            self._connection.give(size)
