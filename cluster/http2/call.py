"""A gRPC call on a server connection: a servicer context like grpc.aio's, whose `send` does not block."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol

import grpc
import grpc.aio
from h2.exceptions import H2Error
from h2.stream import StreamInputs

from cluster.http2 import frames
from cluster.http2.frames import DATA_HEAD, MESSAGE_HEAD
from cluster.http2.h2_state import Http2State
from cluster.http2.messages import BadMessage, Inflater, Metadata, headers_of, status_message
from cluster.http2.request_body import BodyConnection, BodyReservation, Received, RequestBody

if TYPE_CHECKING:
    from h2.stream import H2Stream

_OK_HEAD = b"\x88" + frames.literal(b"content-type", b"application/grpc")  # \x88: `:status: 200` in the static table
_OK_END = frames.literal(b"grpc-status", b"0")
INFLATE_STEP_BYTES: Final = 65_536
"""Number of bytes that a call decompresses before it yields to the event loop."""


class CallConnection(BodyConnection, Protocol):
    """The part of a connection that the connection's calls, the server and the gate use."""

    h2: Http2State
    transport: asyncio.Transport
    peer: str
    paused: bool

    def out(self, data: bytes) -> None:
        """Add bytes to the one send of this event-loop pass."""

    def queue_headers(self, id_bytes: bytes, fields: bytes, end: bool) -> None:
        """Queue a header block, in as many frames as the block needs."""

    def stop_sending(self, stream_id: int) -> None:
        """Reset a stream, so that the client stops sending the rest of the request."""

    def wait_for_window(self, call: ServerCall, *, of_stream: bool) -> None:
        """Register a call to be pushed when the send window of the call's stream (`of_stream`) or of the connection
        grows."""

    def admit(self, call: ServerCall, tenant: str | None) -> None:
        """Record that the gate has admitted a call. Raises BadMessage if too many calls without credentials are
        open."""

    def charge_refusal(self, units: float = 1.0) -> None:
        """Charge a refused or reset call. Cut the connection if the connection's token bucket is empty."""

    def end_early(self, call: ServerCall, error: BadMessage) -> None:
        """End a call whose request is malformed, too large or too slow."""

    def mark_answering(self, path: str) -> None:
        """Handle the start of an answer: mark the client as authenticated, unless `path` is a health or reflection
        method."""

    def mark_authenticated(self) -> None:
        """Mark the client as authenticated."""

    def done(self, call: ServerCall) -> None:
        """Remove a call whose status has been sent."""

    def reset(self, call: ServerCall) -> None:
        """Reset a call whose client does not read."""


class ServerCall:
    """A gRPC call on the server. Handlers may use the methods that have a counterpart in grpc.aio.ServicerContext.

    `send` accepts a serialized message at once, even if the client's flow-control window is closed. While `full` is
    true, the client must read before a writer sends more; `wait_until_writable` waits for the client to read. So a call
    buffers at most the messages that a writer sends between two checks of `full`.
    """

    __slots__ = (
        "_deadline",
        "_end",
        "_h2",
        "_head_sent",
        "_id_bytes",
        "_initial",
        "_metadata",
        "_pending",
        "_reader",
        "_request",
        "_status",
        "_trailing",
        "_writers",
        "admitted",
        "body",
        "caller",
        "closed",
        "connection",
        "deserializer",
        "encoding",
        "half_closed",
        "header_bytes",
        "path",
        "request_whole",
        "serializer",
        "stream",
        "stream_id",
        "task",
        "tenant",
        "timed_out",
        "timer",
    )  # instances with more than 30 attributes would use a dictionary, with slower access

    def __init__(
        self,
        connection: CallConnection,
        stream: H2Stream,
        path: str,
        metadata: Metadata,
        *,
        deadline: float | None = None,
        encoding: str = "identity",
    ) -> None:
        self.path = path
        self.stream_id: int = stream.stream_id
        self.connection = connection
        self.body = RequestBody(connection, self.stream_id, self._too_slow)
        self.encoding = encoding
        self.admitted = False
        """Whether the caller's credentials were accepted, or the method needs no credentials."""
        self.tenant: str | None = None
        """The tenant whose budget of request bytes the request counts against."""
        self.caller: Any = None
        """The caller, as identified by the server's gate."""
        self.header_bytes = 0
        self.request_whole = False
        self.task: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.timed_out = False
        self.closed = False
        """Whether no more bytes can be sent: the status was sent, the stream was reset, or the connection is lost."""
        self.half_closed = False
        self.serializer: Callable[[Any], bytes] | None = None
        self.deserializer: Callable[[Any], Any] | None = None
        self._h2 = connection.h2
        self.stream = stream
        self._id_bytes = self.stream_id.to_bytes(4, "big")
        self._metadata = metadata
        self._deadline = deadline
        self._initial: Sequence[tuple[str, str | bytes]] = ()
        self._trailing: Sequence[tuple[str, str | bytes]] = ()
        self._head_sent = False
        self._status: tuple[grpc.StatusCode, str] | None = None
        self._end: bytes | None = None
        self._pending = bytearray()
        self._writers: list[asyncio.Future[None]] = []
        self._request: BodyReservation | None = None
        self._reader: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<Rpc {self.path} stream {self.stream_id}{' closed' if self.closed else ''}>"

    # ---- as in grpc.aio.ServicerContext

    def invocation_metadata(self) -> Metadata:
        """The caller's metadata."""
        return self._metadata

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None if the call has no deadline."""
        return None if self._deadline is None else max(self._deadline - self.connection.loop.time(), 0.0)

    def peer(self) -> str:
        """The caller's address."""
        return self.connection.peer

    def peer_certificate(self) -> dict[str, Any] | None:
        """The caller's verified certificate in the form that ssl returns; None if the caller presented no
        certificate."""
        tls: ssl.SSLObject | None = self.connection.transport.get_extra_info("ssl_object")
        certificate = tls.getpeercert() if tls is not None else None
        return dict(certificate) if certificate else None

    def set_trailing_metadata(self, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        """Set the metadata that is sent with the status."""
        self._trailing = metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        """Set the status that is sent when the handler returns."""
        self._status = (code, self._status[1] if self._status else "")

    def set_details(self, details: str) -> None:
        """Set the status message that is sent when the handler returns."""
        self._status = (self._status[0] if self._status else grpc.StatusCode.OK, details)

    async def send_initial_metadata(self, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        """Send the response headers now."""
        self._initial = metadata
        self._send_head()

    async def read(self) -> Any:
        """Return the next message of the request stream, or grpc.aio.EOF at the end. Aborts the call if a message
        cannot be parsed."""
        while not len(self.body):
            if self.half_closed or self.closed:
                return grpc.aio.EOF
            await self._wait_for_request()
        received = self.body.pop()
        try:
            data = await self._decompress(received) if received.compressed else received.data
            return data if self.deserializer is None else self.deserializer(data)
        except BadMessage as error:
            code = grpc.StatusCode.RESOURCE_EXHAUSTED if error.too_large else grpc.StatusCode.INTERNAL
            await self.abort(code, str(error))
        except Exception as error:  # deserializers of generated code raise many types
            await self.abort(grpc.StatusCode.INTERNAL, f"cannot deserialize a request message: {error}")
        finally:
            if received.reservation is not None:
                received.reservation.release()

    @property
    def unread_requests(self) -> int:
        """Number of complete request messages that the handler has not read."""
        return len(self.body)

    async def whole_request(self) -> bytes | bytearray | None:
        """Wait for the end of the request and return the only message; None if the request has no message or more than
        one.

        The message's bytes count against the budget until `release_request` is called. Raises BadMessage."""
        while not self.half_closed:
            await self._wait_for_request()
        self.request_whole = True
        if len(self.body) != 1:
            return None
        received = self.body.pop()
        self._request = received.reservation
        return await self._decompress(received) if received.compressed else received.data

    def release_request(self) -> None:
        """Return the bytes of the parsed request to the budget. Idempotent."""
        if self._request is not None:
            self._request.release()
            self._request = None

    async def _wait_for_request(self) -> None:
        self._reader = self.connection.loop.create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    async def _decompress(self, received: Received) -> bytes:
        """Decompress a message in steps, and yield to the event loop between two steps."""
        limits = self.connection.limits
        unauthenticated = self.connection.budget is not None and self.tenant is None
        most = limits.window_bytes if unauthenticated else limits.max_message_bytes
        inflater = Inflater(received.data, self.encoding, most)
        plain = inflater.step(INFLATE_STEP_BYTES)
        if plain is None and received.reservation is None:
            received.reservation = self._request = await self._reserve(most)
        while plain is None:
            await asyncio.sleep(0)
            plain = inflater.step(INFLATE_STEP_BYTES)
        if received.reservation is not None:
            received.reservation.shrink(len(plain))
        return plain

    async def _reserve(self, size: int) -> BodyReservation | None:
        """Reserve `size` bytes in the budget and wait until the budget grants them. Raises BadMessage if too many
        requests wait already."""
        budget = self.connection.budget
        if budget is None or self.tenant is None:
            return None
        if budget.full(self.tenant):
            raise BadMessage("too many requests are being decompressed at once; send fewer", too_large=True)
        granted = asyncio.Event()
        reservation = budget.reserve(self.tenant, self.connection, size, granted.set, self._too_slow)
        reservation.complete()  # all bytes have been received
        try:
            if not reservation.granted:
                await granted.wait()
        except asyncio.CancelledError:
            reservation.release()
            raise
        return reservation

    def _too_slow(self) -> None:
        self.connection.end_early(self, BadMessage("the request was too slow while others waited", too_large=True))

    async def write(self, message: Any) -> None:
        """Send a message and wait until the client has room for another message."""
        self.send(message if self.serializer is None else self.serializer(message))
        if self.full:
            await self.wait_until_writable()

    async def abort(
        self,
        code: grpc.StatusCode,
        details: str = "",
        trailing_metadata: Sequence[tuple[str, str | bytes]] = (),
    ) -> NoReturn:
        """End the call with this status. Raises AbortError."""
        self._status = (code, details)
        self._trailing = trailing_metadata
        raise grpc.aio.AbortError(details)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._messages()

    async def _messages(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message

    # ---- writing without waiting

    @property
    def full(self) -> bool:
        """Whether the client must read before the call may send more."""
        return self.connection.paused or len(self._pending) > 0

    def send(self, message: bytes) -> None:
        """Send one serialized message as soon as the flow-control windows allow. Does nothing if the call is closed."""
        if not self._head_sent:
            self._send_head()
        size = len(message)
        frame = size + 5
        stream, h2 = self.stream, self._h2
        if (
            frame < 2048
            and not self._pending
            and frame <= stream.outbound_flow_control_window
            and frame <= h2.outbound_flow_control_window
            and not self.closed
        ):
            # h2.send_data would do the same for an open stream, but takes 7 µs.
            stream.outbound_flow_control_window -= frame
            h2.outbound_flow_control_window -= frame
            self.connection.out(DATA_HEAD[frame] + self._id_bytes + MESSAGE_HEAD[size] + message)
            return
        self._pending += b"\x00" + size.to_bytes(4, "big")
        self._pending += message
        self.push()

    async def wait_until_writable(self) -> None:
        """Wait until the call is no longer full, or is closed."""
        while self.full and not self.closed:
            waiter = self.connection.loop.create_future()
            self._writers.append(waiter)
            await waiter

    def push(self) -> None:
        """Send pending bytes as far as the flow-control windows allow, and then the status."""
        pending, stream, h2 = self._pending, self.stream, self._h2
        if self.closed:
            pending.clear()
        while pending:
            size = min(
                len(pending), stream.outbound_flow_control_window, h2.outbound_flow_control_window,
                h2.max_outbound_frame_size,
            )  # fmt: skip
            if size <= 0:
                self.connection.wait_for_window(self, of_stream=stream.outbound_flow_control_window <= 0)
                return
            stream.outbound_flow_control_window -= size
            h2.outbound_flow_control_window -= size
            self.connection.out(frames.data_frame(self._id_bytes, bytes(pending[:size])))
            del pending[:size]
        if self._end is not None:
            self._send_end(self._end)
        self.wake_writers()

    def wake_writers(self) -> None:
        """Wake waiting writers if the call is no longer full, or is closed."""
        if not self._writers or (self.full and not self.closed):
            return
        writers, self._writers = self._writers, []
        for writer in writers:
            if not writer.done():
                writer.set_result(None)

    # ---- called by the connection

    def received(self, data: bytes, size: int) -> None:
        """Handle received bytes of the request. `size`: number of bytes including padding. Raises BadMessage."""
        self.body.add(data, size)
        if self.deserializer is not None:
            self._wake_reader()

    def ended(self) -> None:
        """Handle the end of the request: the client has half-closed the stream."""
        self.half_closed = True
        self._wake_reader()

    def close(self) -> None:
        """Close the call, because the client has reset the call or is gone."""
        self.closed = True
        self._pending.clear()
        self.drop_request()
        self._wake_reader()
        self.wake_writers()
        if self.timer is not None:
            self.timer.cancel()
        if self.task is not None:
            self.task.cancel()

    def drop_request(self) -> None:
        """Drop the request's messages and reservations."""
        self.body.close()
        self.release_request()

    def finish(self, code: grpc.StatusCode | None = None, details: str = "", *, at_once: bool = False) -> None:
        """Send the status after all pending bytes: `code` if given, else the status that the handler has set, else OK.

        `at_once`: if bytes are pending, reset the stream instead of waiting for a client that does not read.
        """
        if self.closed or self._end is not None:
            return
        if at_once and self._pending:
            self.connection.reset(self)
            return
        if code is None:
            code, details = self._status or (grpc.StatusCode.OK, "")
        number: int = code.value[0]
        end = frames.literal(b"grpc-status", b"%d" % number) if number else _OK_END
        if details:
            end += frames.literal(b"grpc-message", status_message(details))
        self._end = end + frames.block(headers_of(self._trailing))
        self.push()

    def refuse(self, http_status: bytes) -> None:
        """Send an HTTP status as the answer to a request that is not a gRPC call."""
        self._send_headers(frames.literal(b":status", http_status), end=True)

    def _send_head(self) -> None:
        if not self._head_sent and not self.closed:
            self._head_sent = True
            self.connection.mark_answering(self.path)
            self._send_headers(_OK_HEAD + frames.block(headers_of(self._initial)), end=False)

    def _send_end(self, end: bytes) -> None:
        if self.closed:
            return
        self._send_headers(end if self._head_sent else _OK_HEAD + end, end=True)
        self.closed = True
        self.connection.done(self)

    def _send_headers(self, fields: bytes, end: bool) -> None:
        machine = self.stream.state_machine
        try:
            machine.process_input(StreamInputs.SEND_HEADERS)
            if end:
                machine.process_input(StreamInputs.SEND_END_STREAM)
        except H2Error:  # the received bytes that opened the stream also reset the stream
            self.closed = True
            return
        self.connection.queue_headers(self._id_bytes, fields, end)
        if end and not self.half_closed:  # the reset stops a client that is still sending
            self.connection.stop_sending(self.stream_id)

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
