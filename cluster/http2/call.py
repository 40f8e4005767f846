"""The gRPC calls of a server connection. A call is a servicer context like grpc.aio's, but `send` does not block."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn

import grpc
import grpc.aio
from h2 import events
from h2.errors import ErrorCodes

from cluster.http2 import frames
from cluster.http2.lifetime import ConnectionLifetime
from cluster.http2.limits import CLIENT_FAULT, Charges, ServerLimits
from cluster.http2.messages import BadMessage, Metadata, RequestHead, headers_of, status_message
from cluster.http2.output import ConnectionCore
from cluster.http2.request_body import RequestStream
from cluster.http2.response import MOST_AT_ONCE, ResponseWriter

if TYPE_CHECKING:
    from h2.stream import H2Stream

_OK_END = frames.literal(b"grpc-status", b"0")
UNAUTHENTICATED_HEADER_BYTES: Final = 131_072
"""Maximum size in bytes of the header fields of all open calls, for a connection without an admitted call."""
ANONYMOUS_HEADER_BYTES: Final = 16_384
"""Maximum size in bytes of the header fields of a connection's open calls to methods that need no credential."""
AUTHENTICATED_FACTOR: Final = 32
"""Factor by which UNAUTHENTICATED_HEADER_BYTES is multiplied after a call was admitted."""


class CallTask:
    """The task of a call's handler, and the time limit that cancels the task."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        work: Coroutine[Any, Any, None],
        limit_s: float | None,
        on_unsent: Callable[[], None],
    ) -> None:
        """Start the task. `work`: the handler. `limit_s`: seconds until the task is cancelled; None for no limit.
        `on_unsent`: called at the time limit if the handler has ended but its status is still unsent, because the
        client does not read."""
        self._loop = loop
        self._on_unsent = on_unsent
        self.timed_out = False
        self._timer = None if limit_s is None else loop.call_later(limit_s, self._end)
        self.task = loop.create_task(work)

    def limit(self, seconds: float | None) -> None:
        """Extend the time limit to `seconds` from now, unless the current limit is later. None removes the time
        limit."""
        if self._timer is None:
            return
        if seconds is None:
            self._timer.cancel()
        elif self._loop.time() + seconds > self._timer.when() + 0.01:
            self._timer.cancel()
            self._timer = self._loop.call_later(seconds, self._end)

    def cancel_timer(self) -> None:
        """Remove the time limit."""
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
    true, a writer must stop sending; `wait_until_writable` waits until the client has read enough. So a call buffers at
    most the messages that a writer sends between two checks of `full`.
    """

    def __init__(self, core: ConnectionCore, owner: OpenStreams, stream: H2Stream, head: RequestHead) -> None:
        too_slow = partial(owner.end_slow, self)
        request = RequestStream(core, stream.stream_id, head.encoding, self.abort, too_slow)
        super().__init__(core, stream, head.path, request, owner.done)
        self.owner = owner
        self.header_bytes = head.size
        self.read = request.read  # an attribute and not a method, which would add a Python call per message
        self.admitted = False
        """Whether the caller's credentials were accepted, or the method needs no credentials."""
        self.tenant: str | None = None
        """The tenant whose budget of request bytes the request counts against."""
        self.caller: Any = None
        """The caller, as identified by the server's gate."""
        self.running: CallTask | None = None
        self.serializer: Callable[[Any], bytes] | None = None
        self._metadata = head.metadata
        self._deadline = None if head.timeout_s is None else core.loop.time() + head.timeout_s
        self._trailing: Sequence[tuple[str, str | bytes]] = ()
        self._status: tuple[grpc.StatusCode, str] | None = None

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
        """The caller's verified certificate as ssl returns it; None if the caller presented no certificate."""
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

    async def write_parts(self, parts: list[bytes | bytearray]) -> None:
        """Send one message that is given in parts, as the client reads. The list is emptied."""
        self.begin_message(sum(map(len, parts)))
        parts.reverse()
        while parts and not self.closed:
            self._pending += parts.pop()
            if len(self._pending) >= MOST_AT_ONCE or not parts:
                self.push()
                await asyncio.sleep(0)  # for the socket, which may take less
                await self.wait_until_writable()

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Sequence[tuple[str, str | bytes]] = ()
    ) -> NoReturn:
        """End the call with this status. Raises AbortError."""
        self._status = (code, details)
        self._trailing = trailing_metadata
        raise grpc.aio.AbortError(details)

    @property
    def unread_requests(self) -> int:
        """Number of complete request messages that the handler has not read."""
        return len(self.request.body)

    def mark_admitted(self, tenant: str | None) -> None:
        """Record that the call is authorized. `tenant`: the tenant that is charged for the bytes of the request; None
        if no tenant is."""
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

    def interrupt(self, code: grpc.StatusCode, details: str) -> None:
        """End the call with a status, and cancel the handler."""
        self.finish(code, details, at_once=True)
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


class CallTable:
    """The open calls of one connection by stream id. It also holds the counts and sizes of these calls, on which the
    connection has limits."""

    def __init__(self, limits: ServerLimits, max_calls: int) -> None:
        self._limits = limits
        self._max_calls = max_calls
        self._max_header_bytes = UNAUTHENTICATED_HEADER_BYTES
        self.by_stream: dict[int, ServerCall] = {}
        self._header_bytes = self._anonymous = self._anonymous_bytes = 0

    def admit(self) -> None:
        """Raise the limits of the table to those of an authenticated connection."""
        self._max_calls = self._limits.max_calls
        self._max_header_bytes = UNAUTHENTICATED_HEADER_BYTES * AUTHENTICATED_FACTOR

    def is_full(self, header_bytes: int) -> bool:
        """Return whether the limits forbid another call that has `header_bytes` bytes of header fields."""
        calls = len(self.by_stream)
        return calls >= self._max_calls or (calls > 0 and self._header_bytes + header_bytes > self._max_header_bytes)

    def add(self, call: ServerCall) -> None:
        """Add a call."""
        self.by_stream[call.stream_id] = call
        self._header_bytes += call.header_bytes

    def count_anonymous(self, call: ServerCall) -> None:
        """Count an open call to a method that needs no credential. Raises BadMessage if there are too many."""
        self._anonymous += 1
        self._anonymous_bytes += call.header_bytes
        if self._anonymous > self._limits.anonymous_calls or self._anonymous_bytes > ANONYMOUS_HEADER_BYTES:
            raise BadMessage("too many calls without a credential are open on this connection", too_large=True)

    def remove(self, stream_id: int) -> ServerCall | None:
        """Remove and return a call; None if the stream has no open call."""
        call = self.by_stream.pop(stream_id, None)
        if call is not None:
            self._header_bytes -= call.header_bytes
            if call.admitted and call.tenant is None:
                self._anonymous -= 1
                self._anonymous_bytes -= call.header_bytes
        return call


class OpenStreams:
    """The open calls of one connection. The client's frames open and end the calls; the call table limits them."""

    def __init__(
        self,
        connection: ConnectionCore,
        table: CallTable,
        lifetime: ConnectionLifetime,
        charges: Charges,
        start: Callable[[ServerCall, RequestHead], None],
        on_admitted: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        """`start`: starts or refuses a call whose head has arrived. `on_admitted`: called when the first call with a
        credential is admitted. `on_end`: called after the end of each call."""
        self._table = table
        self.by_stream = table.by_stream
        self.served = False
        """Whether a call to a method that needs a credential was admitted."""
        self.idle_since = connection.loop.time()
        """Loop time at which the last admitted call ended. Refused calls do not change it."""
        self._connection = connection
        self._lifetime = lifetime
        self._charges = charges
        self._start = start
        self._on_admitted = on_admitted
        self._on_end = on_end

    def open(self, event: events.RequestReceived) -> None:
        """Start or refuse the call of a request whose headers have arrived."""
        connection, stream_id = self._connection, event.stream_id
        stream = connection.h2.streams.get(stream_id)
        size = sum([len(name) + len(value) + 32 for name, value in event.headers])  # as in RFC 9113, 6.5.2
        self._charges.charge_fields(size, connection.loop.time())
        if stream is None:
            return
        if not self._lifetime.accepts(stream_id) or self._table.is_full(size):
            connection.output.reset_stream(stream_id, ErrorCodes.REFUSED_STREAM)
            self._drop_refused(stream_id)
            return
        head = RequestHead.of(event.headers, size)
        call = ServerCall(connection, self, stream, head)
        if not head.is_grpc:
            if event.stream_ended is not None:
                call.request.end()
            call.refuse(b"415")
            self._drop_refused(stream_id)
            return
        self._table.add(call)
        self._start(call, head)

    def received(self, event: events.DataReceived) -> None:
        """Pass the data of a DATA frame to the frame's call. h2 has already processed the frame."""
        call = self.by_stream.get(event.stream_id)
        if call is None:
            self._connection.windows.grow(event.flow_controlled_length)
            return
        try:
            call.request.received(event.data, event.flow_controlled_length)
        except BadMessage as error:
            self.end_early(call, error)

    def half_close(self, event: events.StreamEnded) -> None:
        """Handle the end of a call's request."""
        call = self.by_stream.get(event.stream_id)
        if call is not None:
            call.request.end()

    def close(self, event: events.StreamReset) -> None:
        """Close a call that the client has reset, or that h2 has reset because of a protocol error."""
        call = self._remove(event.stream_id)
        if call is not None:
            call.close()
        self._connection.h2.drop_closed(event.stream_id)
        self.charge_refusal(1.0 if event.remote_reset else CLIENT_FAULT)
        self._on_end()

    def close_all(self) -> None:
        """Close all calls after the connection was lost."""
        calls = list(self.by_stream.values())
        self.by_stream.clear()
        self._connection.blocked.clear()
        for call in calls:
            call.close()
        self._on_end()

    def admit(self, call: ServerCall, tenant: str | None) -> None:
        """Record that a call is authorized. `tenant`: the call's tenant; None for a method that needs no credential.

        Raises BadMessage if too many calls without credentials are open.
        """
        call.mark_admitted(tenant)
        if tenant is None:
            self._table.count_anonymous(call)
        else:
            self.served = True
            if not self._connection.windows.admitted:
                self._on_admitted()
                for other in list(self.by_stream.values()):
                    other.request.body.settle_connection()
        call.request.body.admit(tenant)

    def charge_refusal(self, units: float = 1.0) -> None:
        """Charge `units` for a refused or reset call. Close the connection if its token bucket is empty."""
        if not self._charges.charge(units, self._connection.loop.time()) and not self._connection.output.closed:
            self._lifetime.cut("too many resets or refused calls")

    def end_early(self, call: ServerCall, error: BadMessage) -> None:
        """End a call whose request is malformed, too large or too slow."""
        call.interrupt(error.code, str(error))
        self.charge_refusal(CLIENT_FAULT)

    def end_slow(self, call: ServerCall) -> None:
        """End a call whose request arrives too slowly while other requests wait for the budget of request bytes."""
        self.end_early(call, BadMessage("the request was too slow while others waited", too_large=True))

    def end_open_requests(self) -> None:
        """End each call whose client may still send requests, because the connection has reached its age limit. Such a
        call, for example a session, may never end by itself. All other calls continue."""
        for call in list(self.by_stream.values()):
            if not call.request.half_closed:
                call.interrupt(grpc.StatusCode.UNAVAILABLE, "the connection has reached its age limit; connect again")

    def reset(self, call: ServerCall) -> None:
        """Reset a call whose client does not read."""
        self._connection.output.reset_stream(call.stream_id, ErrorCodes.CANCEL)
        call.stop_sending()
        self.done(call.stream_id)

    def end_unread(self, call: ServerCall) -> None:
        """Reset a call whose answer the client has not read for too long, and cancel its handler."""
        self.reset(call)
        if call.running is not None:
            call.running.task.cancel()

    def done(self, stream_id: int) -> None:
        """Remove a call whose status has been sent."""
        call = self._remove(stream_id)
        if call is not None:
            if call.running is not None:
                call.running.cancel_timer()
            call.request.drop()
            self._connection.h2.drop_closed(stream_id)
            self._on_end()
        self._lifetime.close_if_done()

    def _drop_refused(self, stream_id: int) -> None:
        self._connection.h2.drop_closed(stream_id)
        self.charge_refusal()

    def _remove(self, stream_id: int) -> ServerCall | None:
        call = self._table.remove(stream_id)
        if call is not None:
            self._connection.blocked.discard(stream_id)
            if not self.by_stream and (call.admitted or self.served):
                self.idle_since = self._connection.loop.time()
        return call
