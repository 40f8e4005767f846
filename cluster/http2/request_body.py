"""The messages of one call's request: assembled, reserved in the budget, and queued until the handler reads them.

Flow control follows the budget. A client may send the first `window_bytes` of a message without a reservation. For the
rest, the whole size of the message is reserved first (policy/limits/request_bytes.py), and then the stream's window
grows by exactly the size of the rest. So a message with a reservation can always be completed, and each call has at
most one window of bytes without a reservation.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

from cluster.http2.limits import ServerLimits
from cluster.http2.messages import PREFIX_BYTES, Assembler, BadMessage


class BodyReservation(Protocol):
    """A reservation in the budget for the bytes of one message."""

    @property
    def granted(self) -> bool:
        """Whether the bytes may be received now."""

    def received(self, size: int) -> None:
        """Count `size` bytes that have arrived since the grant."""

    def complete(self) -> None:
        """Record that all bytes have arrived."""

    def shrink(self, size: int) -> None:
        """Return all but `size` bytes to the budget."""

    def release(self) -> None:
        """Return the bytes to the budget. Idempotent."""


class Budget(Protocol):
    """The budget in which request bytes are reserved."""

    def full(self, tenant: str) -> bool:
        """Whether so many requests of this tenant wait that a further request must be refused."""

    def reserve(
        self,
        tenant: str,
        connection: Hashable,
        size: int,
        on_grant: Callable[[], None],
        too_slow: Callable[[], None],
    ) -> BodyReservation:
        """Reserve `size` bytes. Calls `on_grant` if the bytes are granted later, and `too_slow` if the request arrives
        too slowly."""


class BodyConnection(Hashable, Protocol):
    """The part of a connection that a request body uses."""

    loop: asyncio.AbstractEventLoop
    limits: ServerLimits
    budget: Budget | None
    admitted: bool

    def grow_window(self, size: int, stream_id: int | None = None) -> None:
        """Grow the receive window of a stream, or of the connection if `stream_id` is None, by `size` bytes."""


@dataclass(slots=True)
class Received:
    """A complete message as received, compressed or not. `on_wire`: size on the wire in bytes."""

    data: bytes | bytearray
    on_wire: int
    compressed: bool
    reservation: BodyReservation | None


class RequestBody:
    """The messages of one call's request. `streaming`: whether the handler reads any number of messages."""

    __slots__ = (
        "_admitted",
        "_allowed_size",
        "_assembler",
        "_connection",
        "_connection_growth",
        "_has_message",
        "_inbox",
        "_reservation",
        "_stream_growth",
        "_stream_id",
        "_tenant",
        "_too_slow",
        "_unread",
        "began_at",
        "streaming",
    )

    def __init__(self, connection: BodyConnection, stream_id: int, too_slow: Callable[[], None]) -> None:
        self.streaming = False
        self.began_at = math.inf
        """Loop time at which the rest of the incomplete message was requested; infinite if no rest is expected."""
        self._connection = connection
        self._stream_id = stream_id
        self._assembler = Assembler(connection.limits.max_message_bytes)
        self._inbox: deque[Received] = deque()
        self._tenant: str | None = None
        self._admitted = self._has_message = False
        self._too_slow = too_slow
        self._reservation: BodyReservation | None = None
        self._allowed_size = 0
        """Size in bytes of the incomplete message with its prefix, after the rest of the message was requested; else
        0."""
        self._stream_growth = 0
        """Bytes by which the stream's receive window is to grow."""
        self._connection_growth = 0
        """Number of received bytes that were not yet returned to the connection's receive window."""
        self._unread = 0
        """Number of bytes of complete messages that no reservation covers and the handler has not read."""

    def __len__(self) -> int:
        return len(self._inbox)

    def admit(self, tenant: str | None) -> None:
        """Record that the caller was admitted. `tenant`: the caller's tenant; None for a method that needs no
        credential. Raises BadMessage."""
        self._tenant, self._admitted = tenant, True
        self.settle()

    def add(self, data: bytes, size: int) -> None:
        """Handle received bytes of the request. `size`: number of bytes including padding. Raises BadMessage."""
        self._connection_growth += size
        self._stream_growth += size - len(data)  # padding is not kept
        if self._reservation is not None:
            self._reservation.received(len(data))
        for message, on_wire, compressed in self._assembler.add(data):
            self._completed(message, on_wire, compressed)
        if self._has_message and not self.streaming and (len(self._inbox) > 1 or self._assembler.held_bytes):
            raise BadMessage("this method takes exactly one request message")
        self.settle()

    def _completed(self, message: bytes | bytearray, on_wire: int, compressed: bool) -> None:
        reservation, self._reservation, self._allowed_size = self._reservation, None, 0
        self.began_at = math.inf
        if reservation is not None:
            reservation.complete()
        else:
            self._unread += on_wire
        self._inbox.append(Received(message, on_wire, compressed, reservation))
        self._has_message = True

    def pop(self) -> Received:
        """Remove and return the next message. The caller must release the message's reservation."""
        received = self._inbox.popleft()
        if self.streaming:
            if received.reservation is None:
                self._unread -= received.on_wire
            self._stream_growth += min(received.on_wire, self._connection.limits.window_bytes)
            self.settle()
        return received

    def close(self) -> None:
        """Drop all messages and reservations."""
        if self._reservation is not None:
            self._reservation.release()
            self._reservation = None
        for message in self._inbox:
            if message.reservation is not None:
                message.reservation.release()
        self._inbox.clear()
        self._assembler.clear()
        self._grow_connection_window(self._connection_growth)

    def settle(self) -> None:
        """Reserve the incomplete message unless it is already reserved, and grow the windows accordingly. Raises
        BadMessage."""
        if not self._allowed_size and self._assembler.held_bytes:
            self._start_message()
        self.settle_connection()
        if self._stream_growth:
            self._grow_stream_window()

    def settle_connection(self) -> None:
        """Return received bytes to the connection's receive window, except bytes that a streaming handler must read
        first."""
        if self._connection.admitted:
            self._grow_connection_window(self._connection_growth - (self._unread if self.streaming else 0))

    def _start_message(self) -> None:
        """Request the rest of a message whose prefix is complete. Raises BadMessage."""
        size, budget, limits = self._assembler.message_bytes, self._connection.budget, self._connection.limits
        if not size or not self._admitted:
            return
        self.began_at = self._connection.loop.time()
        if budget is None:
            self._allowed_size = size
            self._allow_rest()
        elif self._tenant is not None:
            self._allowed_size = size
            self._reserve(budget, self._tenant)
        elif size > limits.window_bytes:
            most = limits.window_bytes - PREFIX_BYTES
            raise BadMessage(
                f"the message has {size - PREFIX_BYTES} bytes; without a credential the limit is {most}",
                too_large=True,
            )

    def _reserve(self, budget: Budget, tenant: str) -> None:
        if budget.full(tenant):
            message = "too many requests are being received at once; send fewer, or send this one again later"
            raise BadMessage(message, too_large=True)
        size = self._allowed_size
        if self._assembler.compressed:  # the decompressed size is unknown, and reserving in two steps could deadlock
            size += self._connection.limits.max_message_bytes
        self._reservation = budget.reserve(tenant, self._connection, size, self._allow_rest, self._too_slow)
        if self._reservation.granted:
            self._allow_rest()

    def _allow_rest(self) -> None:
        self._stream_growth += max(self._allowed_size - self._connection.limits.window_bytes, 0)
        self._grow_stream_window(at_once=True)

    def _grow_stream_window(self, at_once: bool = False) -> None:
        at_once = at_once or self._allowed_size > 0  # the rest of a message must not wait for half a window
        if self._stream_growth and (at_once or self._stream_growth >= self._connection.limits.window_bytes // 2):
            size, self._stream_growth = self._stream_growth, 0
            self._connection.grow_window(size, self._stream_id)

    def _grow_connection_window(self, size: int) -> None:
        size = min(size, self._connection_growth)
        if size > 0:
            self._connection_growth -= size
            self._connection.grow_window(size)
