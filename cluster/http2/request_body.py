"""The messages of one call's request: assembled, reserved in the budget, and queued until the handler reads them.

A client may send the first `window_bytes` of a message without a reservation. Before the client may send the rest, the
whole size of the message is reserved in the budget (policy/limits/request_bytes.py). Then the stream's window grows by
exactly the size of the rest. So a message with a reservation can always be completed, and each call has at most one
window of bytes without a reservation.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import grpc
import grpc.aio

from cluster.http2.limits import BodyReservation, Budget
from cluster.http2.messages import PREFIX_BYTES, Assembler, BadMessage, Inflater
from cluster.http2.output import ConnectionCore

INFLATE_STEP_BYTES: Final = 65_536
"""Number of bytes that a call decompresses before it yields to the event loop."""


READ_AT_ONCE: Final = 16
"""Number of waiting messages of one call that its handler reads before other tasks run."""


@dataclass(slots=True)
class Received:
    """A complete message as received, compressed or not. `on_wire`: size on the wire in bytes."""

    data: bytes | bytearray
    on_wire: int
    compressed: bool
    reservation: BodyReservation | None


class RequestBody:
    """The request messages of one call. `streaming`: True if the handler reads a stream of messages, False if it reads
    a single one."""

    def __init__(self, connection: ConnectionCore, stream_id: int, too_slow: Callable[[], None]) -> None:
        self.streaming = False
        self.began_at = math.inf
        """Loop time since which the rest of the incomplete message is expected; infinite if no rest is expected."""
        self._connection = connection
        self._stream_id = stream_id
        self._assembler = Assembler(connection.limits.max_message_bytes)
        self._inbox: deque[Received] = deque()
        self.tenant: str | None = None
        """The tenant whose budget the request counts against; None before the caller was admitted, and for a method
        that needs no credential."""
        self._admitted = self._has_message = False
        self._too_slow = too_slow
        self._reservation: BodyReservation | None = None
        self._allowed_size = 0
        """Size in bytes of the incomplete message with its prefix. 0 while there is no such message, or while its
        reservation is needed but not requested yet."""
        self._stream_growth = 0
        """Bytes by which the stream's receive window is to grow. The window grows at once if the client may send the
        rest of a message, else when half a window has accumulated."""
        self._half_window = connection.limits.window_bytes // 2
        self._connection_growth = 0
        """Number of received bytes that were not yet returned to the connection's receive window."""
        self._unread = 0
        """Number of bytes of complete messages that no reservation covers and the handler has not read."""

    def __len__(self) -> int:
        return len(self._inbox)

    def admit(self, tenant: str | None) -> None:
        """Record that the caller was admitted. `tenant`: the caller's tenant; None for a method that needs no
        credential. Raises BadMessage if a received part of the body is invalid."""
        self.tenant, self._admitted = tenant, True
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
        """Reserve bytes for the incomplete message if none are reserved yet, and enlarge the receive windows. Raises
        BadMessage."""
        if not self._allowed_size and self._assembler.held_bytes:
            self._start_message()
        if self._connection_growth:
            self.settle_connection()
        if self._stream_growth >= self._half_window or (self._stream_growth and self._allowed_size):
            self._grow_stream_window()

    def settle_connection(self) -> None:
        """Enlarge the connection's receive window by the number of bytes that the request has brought, so that the
        client can send as many again. Bytes that a streaming handler has not read yet are not counted. Does nothing
        before the connection is admitted."""
        if self._connection.windows.admitted:
            self._grow_connection_window(self._connection_growth - (self._unread if self.streaming else 0))

    def _start_message(self) -> None:
        """Begin a message whose length prefix has arrived: reserve bytes for it, and let the client send the rest.
        Raises BadMessage."""
        size, budget, limits = self._assembler.message_bytes, self._connection.budget, self._connection.limits
        if not size or not self._admitted:
            return
        self.began_at = self._connection.loop.time()
        if budget is None:
            self._allowed_size = size
            self._allow_rest()
        elif self.tenant is not None:
            self._allowed_size = size
            self._reserve(budget, self.tenant)
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
        self._grow_stream_window()

    def _grow_stream_window(self) -> None:
        if self._stream_growth:
            size, self._stream_growth = self._stream_growth, 0
            self._connection.windows.grow(size, self._stream_id)

    def _grow_connection_window(self, size: int) -> None:
        size = min(size, self._connection_growth)
        if size > 0:
            self._connection_growth -= size
            self._connection.windows.grow(size)


Abort = Callable[[grpc.StatusCode, str], Awaitable[NoReturn]]


class RequestStream:
    """The request of one call, as the handler reads it: decompressed and, if the handler reads several messages,
    parsed."""

    def __init__(
        self, connection: ConnectionCore, stream_id: int, encoding: str, abort: Abort, too_slow: Callable[[], None]
    ) -> None:
        """`encoding`: the compression of the messages. `abort`: ends the call with a status. `too_slow`: called when
        the request arrives too slowly while other requests wait for memory in the budget of request bytes."""
        self.body = RequestBody(connection, stream_id, too_slow)
        self.half_closed = False
        """Whether the client has ended the request."""
        self.complete = False
        """Whether the handler's only message has arrived."""
        self._connection = connection
        self._encoding = encoding
        self._abort = abort
        self._too_slow = too_slow
        self._parse: Callable[[Any], Any] | None = None
        self._closed = False
        self._held: BodyReservation | None = None
        """The reservation of the message that the handler has read last."""
        self._waiter: asyncio.Future[None] | None = None
        self._read_at_once = 0
        """Number of messages that were read since the handler last waited."""

    def stream(self, parse: Callable[[Any], Any]) -> None:
        """Prepare this request for a handler that calls `read` any number of times, once for each message. `parse`:
        parses each message."""
        self._parse = parse
        self.body.streaming = True

    def received(self, data: bytes, size: int) -> None:
        """Handle received bytes of the request. `size`: number of bytes including padding. Raises BadMessage."""
        self.body.add(data, size)
        if self._parse is not None:
            self._wake()

    def end(self) -> None:
        """Handle the end of the request: the client has half-closed the stream."""
        self.half_closed = True
        self._wake()

    def close(self) -> None:
        """Drop the request, because the client has reset the call or is gone."""
        self._closed = True
        self.drop()
        self._wake()

    def drop(self) -> None:
        """Drop the request's messages and reservations."""
        self.body.close()
        self.release()

    def release(self) -> None:
        """Return the bytes of the message that was read last to the budget of request bytes. Idempotent."""
        if self._held is not None:
            self._held.release()
            self._held = None

    def take_release(self) -> Callable[[], None] | None:
        """Return the function that returns the bytes of the message that was read last to the budget of request bytes.
        The caller must call it; the next `read` then does not. None if the message holds no bytes of the budget."""
        held, self._held = self._held, None
        return None if held is None else held.release

    async def read(self) -> Any:
        """Return the next message, or grpc.aio.EOF at the end. Aborts the call if a message cannot be parsed. The
        message's bytes count against the budget until the next `read`."""
        self.release()
        if len(self.body):
            self._read_at_once += 1
            if self._read_at_once >= READ_AT_ONCE:  # others must run, however many messages wait here
                self._read_at_once = 0
                await asyncio.sleep(0)
        while not len(self.body):
            if self.half_closed or self._closed:
                return grpc.aio.EOF
            self._read_at_once = 0
            await self._wait()
        received = self.body.pop()
        try:
            data = await self._decompress(received) if received.compressed else received.data
            return data if self._parse is None else self._parse(data)
        except BadMessage as error:
            await self._abort(error.code, str(error))
        except Exception as error:  # parsers of generated code raise many types
            await self._abort(grpc.StatusCode.INTERNAL, f"cannot deserialize a request message: {error}")
        finally:
            self._held = received.reservation

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message

    async def only_message(self) -> bytes | bytearray | None:
        """Wait for the end of the request and return the only message; None if the request has no message or more than
        one.

        The message's bytes count against the budget until `release` is called. Raises BadMessage."""
        while not self.half_closed:
            await self._wait()
        self.complete = True
        if len(self.body) != 1:
            return None
        received = self.body.pop()
        self._held = received.reservation
        return await self._decompress(received) if received.compressed else received.data

    async def _wait(self) -> None:
        self._waiter = self._connection.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _decompress(self, received: Received) -> bytes:
        """Decompress a message in steps, and yield to the event loop after each step."""
        limits = self._connection.limits
        unauthenticated = self._connection.budget is not None and self.body.tenant is None
        most = limits.window_bytes if unauthenticated else limits.max_message_bytes
        inflater = Inflater(received.data, self._encoding, most)
        plain = inflater.step(INFLATE_STEP_BYTES)
        if plain is None and received.reservation is None:
            received.reservation = self._held = await self._reserve(most)
        while plain is None:
            await asyncio.sleep(0)
            plain = inflater.step(INFLATE_STEP_BYTES)
        if received.reservation is not None:
            received.reservation.shrink(len(plain))
        return plain

    async def _reserve(self, size: int) -> BodyReservation | None:
        """Reserve `size` bytes in the budget and wait until the budget grants them. Raises BadMessage if too many
        requests wait already."""
        budget, tenant = self._connection.budget, self.body.tenant
        if budget is None or tenant is None:
            return None
        if budget.full(tenant):
            raise BadMessage("too many requests are being decompressed at once; send fewer", too_large=True)
        granted = asyncio.Event()
        reservation = budget.reserve(tenant, self._connection, size, granted.set, self._too_slow)
        reservation.complete()  # all bytes have been received
        try:
            if not reservation.granted:
                await granted.wait()
        except asyncio.CancelledError:
            reservation.release()
            raise
        return reservation
