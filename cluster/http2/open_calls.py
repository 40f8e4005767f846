"""The open calls of one connection: each begins with a request's head, and ends once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from h2 import events
from h2.errors import ErrorCodes

from cluster.http2.call import ServerCall
from cluster.http2.lifetime import ConnectionLifetime
from cluster.http2.limits import CLIENT_FAULT, Charges, ServerLimits
from cluster.http2.messages import BadMessage, CallHead, header_bytes
from cluster.http2.output import ConnectionCore

UNAUTHENTICATED_HEADER_BYTES: Final = 131_072
"""Maximum size in bytes of the header fields of all open calls, for a connection without an admitted call."""
ANONYMOUS_HEADER_BYTES: Final = 16_384
"""Maximum size in bytes of the header fields of a connection's open calls to methods that need no credential."""
AUTHENTICATED_FACTOR: Final = 32
"""Factor by which UNAUTHENTICATED_HEADER_BYTES is multiplied after a call was admitted."""
NO_CALL: Final = CallHead("", (), None, "identity", 0)
"""The head of a request that is not a gRPC call."""


class CallTable:
    """The open calls of one connection by stream id, and the counts that limit them."""

    def __init__(self, limits: ServerLimits, max_calls: int) -> None:
        self._limits = limits
        self._max_calls = max_calls
        self._max_header_bytes = UNAUTHENTICATED_HEADER_BYTES
        self.by_stream: dict[int, ServerCall] = {}
        self._header_bytes = self._anonymous = self._anonymous_bytes = 0

    def admit(self) -> None:
        """Replace the limits by the limits of an authenticated connection."""
        self._max_calls = self._limits.max_calls
        self._max_header_bytes = UNAUTHENTICATED_HEADER_BYTES * AUTHENTICATED_FACTOR

    def is_full(self, header_bytes: int) -> bool:
        """Whether the table has no room for another call with header fields of this size."""
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


class OpenCalls:
    """The open calls of one connection: opened by the client's frames, limited, and ended once."""

    def __init__(
        self,
        connection: ConnectionCore,
        table: CallTable,
        lifetime: ConnectionLifetime,
        charges: Charges,
        start: Callable[[ServerCall, CallHead], None],
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

    # ---- opened and ended by the client

    def open(self, event: events.RequestReceived) -> None:
        """Start or refuse the call of a request whose headers have arrived."""
        connection, stream_id = self._connection, event.stream_id
        stream = connection.h2.streams.get(stream_id)
        size = header_bytes(event.headers)
        self._charges.charge_fields(size, connection.loop.time())
        if stream is None:
            return
        if not self._lifetime.accepts(stream_id) or self._table.is_full(size):
            connection.output.reset_stream(stream_id, ErrorCodes.REFUSED_STREAM)
            self._drop_refused(stream_id)
            return
        head = CallHead.of(event.headers, size)
        if head is None:
            refused = ServerCall(connection, self, stream, NO_CALL)
            if event.stream_ended is not None:
                refused.request.end()
            refused.refuse(b"415")
            self._drop_refused(stream_id)
            return
        call = ServerCall(connection, self, stream, head)
        self._table.add(call)
        self._start(call, head)

    def received(self, event: events.DataReceived) -> None:
        """Handle a DATA frame that h2 has handled."""
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
        """Close a call that the client has reset, or that h2 has reset for a protocol error."""
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

    # ---- used by the calls and the server (call.CallOwner)

    def admit(self, call: ServerCall, tenant: str | None) -> None:
        """Record that the gate has admitted a call. `tenant`: the call's tenant; None for a method that needs no
        credential.

        Raises BadMessage if too many calls without credentials are open."""
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
        """Charge a refused or reset call. Cut the connection if the connection's token bucket is empty."""
        if not self._charges.charge(units, self._connection.loop.time()) and not self._connection.output.closed:
            self._lifetime.cut("too many resets or refused calls")

    def end_early(self, call: ServerCall, error: BadMessage) -> None:
        """End a call whose request is malformed, too large or too slow."""
        call.fail(error)
        self.charge_refusal(CLIENT_FAULT)

    def reset(self, call: ServerCall) -> None:
        """Reset a call whose client does not read."""
        self._connection.output.reset_stream(call.stream_id, ErrorCodes.CANCEL)
        call.stop_sending()
        self.done(call.stream_id)

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
