"""A gRPC call on a server connection: a servicer context like grpc.aio's, whose `send` does not block."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import grpc
import grpc.aio
from h2.exceptions import H2Error
from h2.stream import StreamInputs

from cluster.http2 import frames
from cluster.http2.frames import DATA_HEAD, MESSAGE_HEAD
from cluster.http2.messages import BadMessage, CallHead, Metadata, headers_of, status_message
from cluster.http2.output import ConnectionCore
from cluster.http2.request_body import RequestReader

if TYPE_CHECKING:
    from h2.stream import H2Stream

_OK_HEAD = b"\x88" + frames.literal(b"content-type", b"application/grpc")  # \x88: `:status: 200` in the static table
_OK_END = frames.literal(b"grpc-status", b"0")
_ANONYMOUS_PATHS = ("/grpc.health.", "/grpc.reflection.")
"""Paths of methods whose answer says nothing about the client's credential."""


class CallOwner(Protocol):
    """The open calls of a connection, to which each call belongs."""

    def admit(self, call: ServerCall, tenant: str | None) -> None:
        """Record that the gate has admitted a call. `tenant`: the call's tenant; None for a method that needs no
        credential.

        Raises BadMessage if too many calls without credentials are open."""

    def charge_refusal(self, units: float = 1.0) -> None:
        """Charge a refused or reset call. Cut the connection if the connection's token bucket is empty."""

    def end_early(self, call: ServerCall, error: BadMessage) -> None:
        """End a call whose request is malformed, too large or too slow."""

    def reset(self, call: ServerCall) -> None:
        """Reset a call whose client does not read."""

    def done(self, stream_id: int) -> None:
        """Remove a call whose status has been sent."""


class ResponseWriter:
    """The answer to one call. `send` accepts a message at once, and buffers what the client's windows do not allow."""

    def __init__(
        self, connection: ConnectionCore, owner: CallOwner, stream: H2Stream, path: str, request: RequestReader
    ) -> None:
        self.path = path
        self.stream = stream
        self.stream_id: int = stream.stream_id
        self.request = request
        self.connection = connection
        self.owner = owner
        self._h2 = connection.h2
        self._output = connection.output
        self._id_bytes = self.stream_id.to_bytes(4, "big")
        self._head_sent = False
        self._end: bytes | None = None
        self._writers: list[asyncio.Future[None]] = []
        self._pending = bytearray()
        """Bytes of messages that the flow-control windows do not allow yet."""
        self.closed = False
        """Whether no more bytes can be sent: the status was sent, the stream was reset, or the connection is lost."""

    @property
    def full(self) -> bool:
        """Whether the client must read before more may be sent."""
        return self._output.paused or len(self._pending) > 0

    def send(self, message: bytes) -> None:
        """Send one serialized message as soon as the flow-control windows allow. Does nothing if the call is closed."""
        if not self._head_sent:
            self.send_head()
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
            self._output.write(DATA_HEAD[frame] + self._id_bytes + MESSAGE_HEAD[size] + message)
            return
        self._pending += b"\x00" + size.to_bytes(4, "big")
        self._pending += message
        self.push()

    async def wait_until_writable(self) -> None:
        """Wait until the answer is no longer full, or is closed."""
        while self.full and not self.closed:
            waiter = asyncio.get_running_loop().create_future()
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
                self.connection.blocked.add(self, of_stream=stream.outbound_flow_control_window <= 0)
                return
            stream.outbound_flow_control_window -= size
            h2.outbound_flow_control_window -= size
            self._output.write(frames.data_frame(self._id_bytes, bytes(pending[:size])))
            del pending[:size]
        if self._end is not None:
            self._send_end(self._end)
        self.wake_writers()

    def wake_writers(self) -> None:
        """Wake waiting writers if the answer is no longer full, or is closed."""
        if not self._writers or (self.full and not self.closed):
            return
        writers, self._writers = self._writers, []
        for writer in writers:
            if not writer.done():
                writer.set_result(None)

    def stop_sending(self) -> None:
        """Send nothing more: the stream was reset, or the client is gone."""
        self.closed = True
        self._pending.clear()
        self.wake_writers()

    def send_head(self, metadata: Sequence[tuple[str, str | bytes]] = ()) -> None:
        """Send the response headers, unless they were sent."""
        if not self._head_sent and not self.closed:
            self._head_sent = True
            if not self.path.startswith(_ANONYMOUS_PATHS):
                self.connection.mark_authenticated()
            self._send_headers(_OK_HEAD + frames.block(headers_of(metadata)), end=False)

    def send_status(self, fields: bytes) -> None:
        """Send the header block with the status after all pending bytes."""
        self._end = fields
        self.push()

    def refuse(self, http_status: bytes) -> None:
        """Send an HTTP status as the answer to a request that is not a gRPC call."""
        self._send_headers(frames.literal(b":status", http_status), end=True)

    def _send_end(self, end: bytes) -> None:
        if self.closed:
            return
        self._send_headers(end if self._head_sent else _OK_HEAD + end, end=True)
        self.closed = True
        self.owner.done(self.stream_id)

    def _send_headers(self, fields: bytes, end: bool) -> None:
        machine = self.stream.state_machine
        try:
            machine.process_input(StreamInputs.SEND_HEADERS)
            if end:
                machine.process_input(StreamInputs.SEND_END_STREAM)
        except H2Error:  # the received bytes that opened the stream also reset the stream
            self.closed = True
            return
        self._output.write_headers(self._id_bytes, fields, end)
        if end and not self.request.half_closed:  # the reset stops a client that is still sending
            self._output.reset_stream(self.stream_id)


class CallTask:
    """The task of a call's handler, and the time limit that cancels the task."""

    __slots__ = ("_loop", "_on_unsent", "_timer", "task", "timed_out")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        work: Coroutine[Any, Any, None],
        limit_s: float | None,
        on_unsent: Callable[[], None],
    ) -> None:
        """`on_unsent`: called at the time limit if the handler has ended and the status waits for the client."""
        self._loop = loop
        self._on_unsent = on_unsent
        self.timed_out = False
        self._timer = None if limit_s is None else loop.call_later(limit_s, self._end)
        self.task = loop.create_task(work)

    def limit(self, seconds: float | None) -> None:
        """Replace the time limit by a later one, or by none."""
        if self._timer is None:
            return
        if seconds is None:
            self._timer.cancel()
        elif self._loop.time() + seconds > self._timer.when() + 0.01:
            self._timer.cancel()
            self._timer = self._loop.call_later(seconds, self._end)

    def cancel_timer(self) -> None:
        """End the time limit."""
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        self.timed_out = True
        if self.task.done():
            self._on_unsent()
        else:
            self.task.cancel()


class ServerCall(ResponseWriter):
    """A gRPC call on the server. Handlers may use the methods that have a counterpart in grpc.aio.ServicerContext.

    `send` accepts a serialized message at once, even if the client's flow-control window is closed. While `full` is
    true, the client must read before a writer sends more; `wait_until_writable` waits for the client to read. So a call
    buffers at most the messages that a writer sends between two checks of `full`.
    """

    def __init__(self, connection: ConnectionCore, owner: CallOwner, stream: H2Stream, head: CallHead) -> None:
        request = RequestReader(connection, stream.stream_id, head.encoding, self.abort, self._too_slow)
        super().__init__(connection, owner, stream, head.path, request)
        self.header_bytes = head.size
        self.read = request.read  # the reader's own method, so that a message costs no further call
        self.admitted = False
        """Whether the caller's credentials were accepted, or the method needs no credentials."""
        self.tenant: str | None = None
        """The tenant whose budget of request bytes the request counts against."""
        self.caller: Any = None
        """The caller, as identified by the server's gate."""
        self.running: CallTask | None = None
        self.serializer: Callable[[Any], bytes] | None = None
        self._metadata = head.metadata
        self._deadline = None if head.timeout_s is None else connection.loop.time() + head.timeout_s
        self._trailing: Sequence[tuple[str, str | bytes]] = ()
        self._status: tuple[grpc.StatusCode, str] | None = None

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
        self.send_head(metadata)

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

    # ---- beyond grpc.aio.ServicerContext

    @property
    def unread_requests(self) -> int:
        """Number of complete request messages that the handler has not read."""
        return len(self.request.body)

    def release_request(self) -> None:
        """Return the bytes of the parsed request to the budget. Idempotent."""
        self.request.release()

    # ---- called by the server and the connection

    def mark_admitted(self, tenant: str | None) -> None:
        """Record that the gate has admitted the call."""
        self.admitted, self.tenant = True, tenant

    def run(self, work: Coroutine[Any, Any, None], limit_s: float | None, serializer: Callable[[Any], bytes]) -> None:
        """Run the call's handler, for at most `limit_s` seconds. `serializer`: serializes what the handler writes."""
        self.serializer = serializer
        self.running = CallTask(self.connection.loop, work, limit_s, partial(self.owner.reset, self))

    def close(self) -> None:
        """Close the call, because the client has reset the call or is gone."""
        self.request.close()
        self.stop_sending()
        if self.running is not None:
            self.running.cancel_timer()
            self.running.task.cancel()

    def fail(self, error: BadMessage) -> None:
        """End the call, whose request is malformed or too large."""
        code = grpc.StatusCode.RESOURCE_EXHAUSTED if error.too_large else grpc.StatusCode.INTERNAL
        self.finish(code, str(error), at_once=True)
        if self.running is not None:
            self.running.task.cancel()

    def finish(self, code: grpc.StatusCode | None = None, details: str = "", *, at_once: bool = False) -> None:
        """Send the status after all pending bytes: `code` if given, else the status that the handler has set, else OK.

        `at_once`: if bytes are pending, reset the stream instead of waiting for a client that does not read.
        """
        if self.closed or self._end is not None:
            return
        if at_once and self._pending:
            self.owner.reset(self)
            return
        if code is None:
            code, details = self._status or (grpc.StatusCode.OK, "")
        number: int = code.value[0]
        end = frames.literal(b"grpc-status", b"%d" % number) if number else _OK_END
        if details:
            end += frames.literal(b"grpc-message", status_message(details))
        self.send_status(end + frames.block(headers_of(self._trailing)))

    def _too_slow(self) -> None:
        self.owner.end_early(self, BadMessage("the request was too slow while others waited", too_large=True))
