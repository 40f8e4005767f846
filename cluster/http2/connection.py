"""A connection from one client to the server: the connection's calls, limits and writes. h2 keeps the protocol's
state."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import structlog
from h2 import events
from h2.connection import ConnectionState
from h2.errors import ErrorCodes
from h2.exceptions import H2Error
from h2.settings import SettingCodes
from hyperframe.frame import Frame, GoAwayFrame, SettingsFrame

from cluster.http2 import frames
from cluster.http2.call import ServerCall
from cluster.http2.connection_table import ConnectionStage
from cluster.http2.frame_costs import CLIENT_FAULT, Charges
from cluster.http2.frame_intake import FrameIntake
from cluster.http2.frame_reader import FrameReader
from cluster.http2.h2_state import Http2State
from cluster.http2.limits import FIRST_WINDOW_BYTES, ServerLimits
from cluster.http2.messages import ENCODINGS, BadMessage, Metadata, metadata_of, timeout_s
from cluster.http2.read_slices import ReadTurns
from cluster.http2.request_body import Budget
from cluster.http2.reset_streams import EndedStreams
from cluster.http2.timeouts import ConnectionTimers

if TYPE_CHECKING:
    from cluster.http2.connection_table import ConnectionSlot

log = structlog.get_logger("rpc")

_HTTP1 = (b"GET ", b"POST", b"PUT ", b"HEAD", b"OPTI", b"DELE", b"CONN", b"PATC")
_HTTP1_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n"
    b"this port speaks gRPC (HTTP/2); OpenAI's HTTP API is on the gateway's http port\n"
)
_ANONYMOUS_PATHS = ("/grpc.health.", "/grpc.reflection.")
MAX_STREAM_ID: Final = 2**31 - 1
FRAME_HEAD_BYTES: Final = 9
UNAUTHENTICATED_FRAME_BYTES: Final = 16_384
"""Maximum frame size in bytes before a call was admitted. HTTP/2 allows no lower maximum."""
UNAUTHENTICATED_RESETS_NOTED: Final = 128
UNAUTHENTICATED_HEADER_BYTES: Final = 131_072
"""Maximum size in bytes of the header fields of all open calls, for a connection without an admitted call."""
ANONYMOUS_HEADER_BYTES: Final = 16_384
"""Maximum size in bytes of the header fields of a connection's open calls to methods that need no credential."""
AUTHENTICATED_FACTOR: Final = 32
"""Factor by which UNAUTHENTICATED_HEADER_BYTES is multiplied after a call was admitted."""
UNAUTHENTICATED_UNSENT_BYTES: Final = 1 << 20
# Read buffer that all connections share; its size is the most that one connection reads in one pass. asyncio's own
# reads of 256 KiB, handled by h2, blocked the event loop for 20 ms when many long prompts came at once.
_READ = memoryview(bytearray(65_536))
_UNAUTHENTICATED_READ = _READ[:UNAUTHENTICATED_FRAME_BYTES]


class ConnectionServer(Protocol):
    """The part of the server that connections use."""

    budget: Budget | None
    turns: ReadTurns
    connections: set[Connection]

    @property
    def gate(self) -> object | None:
        """The gate that authorizes calls; None if the server needs no credential."""

    def start_call(self, call: ServerCall, unknown_encoding: str, problem: str, seconds: float | None) -> None:
        """Start a call whose headers have arrived. `problem`: the error in the headers, empty if the headers are
        valid."""

    def bad_message(self, call: ServerCall, error: BadMessage) -> None:
        """End a call whose request is malformed or too large."""

    def call_ended(self) -> None:
        """Handle the end of a call. After the last call, a server that is stopping closes its connections."""

    def note(self, event: str, connection: Connection, reason: str) -> None:
        """Log an event of a connection, with at most one line a second for each kind of event."""


class Connection(asyncio.BufferedProtocol):
    """A connection from one client."""

    __slots__ = (
        "_age_s",
        "_anonymous_bytes",
        "_anonymous_calls",
        "_blocked",
        "_blocked_streams",
        "_charges",
        "_control_bytes",
        "_control_writes",
        "_flushing",
        "_header_bytes",
        "_held",
        "_last_accepted",
        "_leaving",
        "_max_calls",
        "_must_reset_table",
        "_refusing",
        "_server",
        "_timers",
        "_unsent",
        "_window_growth",
        "admitted",
        "budget",
        "calls",
        "closing",
        "h2",
        "intake",
        "limits",
        "loop",
        "paused",
        "peer",
        "transport",
    )  # instances with more than 30 attributes would use a dictionary, with slower access

    def __init__(self, server: ConnectionServer, limits: ServerLimits, age_s: float, held: ConnectionSlot) -> None:
        """`age_s`: age limit of this connection in seconds, 0 for none. `held`: the connection's slot in the port's
        pool."""
        self._held = held
        self.loop = asyncio.get_running_loop()
        self.limits = limits
        self.budget: Budget | None = server.budget
        self.h2 = Http2State(EndedStreams(UNAUTHENTICATED_RESETS_NOTED))
        self.peer = ""
        self.paused = False
        self.admitted = False
        """Whether a call of this connection presented an accepted credential, or the server needs no credential."""
        self.calls: dict[int, ServerCall] = {}
        self.transport: asyncio.Transport
        self._server = server
        self._age_s = age_s
        self._charges = Charges(limits, self.loop.time())
        reader = FrameReader(UNAUTHENTICATED_FRAME_BYTES, limits.max_header_bytes)
        self.intake = FrameIntake(self, reader, self._charges, server.turns)
        self._timers = ConnectionTimers(self)
        self._unsent: list[bytes] = []
        self._flushing = False
        """Whether a flush of `_unsent` is scheduled for this event-loop pass."""
        self._control_bytes = self._control_writes = 0
        """Numbers of bytes and of writes in `_unsent` that belong to control frames, which are everything except
        answers to calls."""
        self._window_growth = 0
        """Bytes by which the connection's receive window is to grow."""
        self._max_calls = (
            limits.max_calls if server.gate is None else min(limits.unauthenticated_calls, limits.max_calls)
        )
        self._header_bytes = self._anonymous_calls = self._anonymous_bytes = 0
        self._must_reset_table = True
        self._blocked: dict[int, ServerCall] = {}
        """Calls that wait for the connection's send window, in the order in which they will be pushed."""
        self._blocked_streams: dict[int, ServerCall] = {}
        self.closing = False
        """Whether received bytes are ignored from now on."""
        self._leaving = self._refusing = False
        self._last_accepted = MAX_STREAM_ID

    # ---- asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the server's settings and start the timers."""
        self.transport = cast(asyncio.Transport, transport)
        self._held.connection = self
        if self._held.released:
            self.transport.abort()
        name = transport.get_extra_info("peername")
        self.peer = _peer(name)
        limits = self.limits
        h2 = self.h2
        known = self._server.gate is None
        h2.local_settings = type(h2.local_settings)(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: self._max_calls,
                SettingCodes.MAX_HEADER_LIST_SIZE: limits.max_header_bytes,
                SettingCodes.INITIAL_WINDOW_SIZE: limits.window_bytes,
                SettingCodes.MAX_FRAME_SIZE: limits.frame_bytes if known else UNAUTHENTICATED_FRAME_BYTES,
            },
        )
        h2.decoder.max_header_list_size = limits.max_header_bytes
        h2.initiate_connection()
        if known:
            self._raise_limits()
        self.send_h2_output()
        self._timers.begin(self._age_s)
        self._server.connections.add(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the buffer to read into."""
        return _READ if self.admitted else _UNAUTHENTICATED_READ

    def buffer_updated(self, nbytes: int) -> None:
        """Handle bytes received from the client."""
        if self.closing:
            return
        if not self._timers.greeted and bytes(_READ[:4]) in _HTTP1:
            self._refuse_http1()
            return
        self.intake.feed(_READ[:nbytes])

    def handle(self, frame: Frame) -> None:
        """Handle a frame that was already charged. Raises H2Error."""
        received = self.h2.receive_frame(frame)
        if type(frame) is SettingsFrame:
            # New settings apply at once, so their acknowledgement is sent first. Without the acknowledgement, a client
            # treats a larger frame, or more data than the old window allows, as an error and resets the stream.
            self.send_h2_output()
        for event in received:
            handle = _EVENTS.get(type(event))
            if handle is not None and not self.closing:
                handle(self, event)

    def connection_lost(self, error: Exception | None) -> None:
        """Close all calls after the connection was lost."""
        self.closing = True
        self._held.release()
        self._timers.end()
        self._server.connections.discard(self)
        calls, self.calls = list(self.calls.values()), {}
        self._blocked.clear()
        self._blocked_streams.clear()
        self.intake.clear()
        for call in calls:
            call.close()
        self._server.call_ended()

    def pause_writing(self) -> None:
        """Stop writing while the client does not read."""
        self.paused = True

    def resume_writing(self) -> None:
        """Resume writing when the client reads again."""
        self.paused = False
        for call in list(self.calls.values()):
            call.wake_writers()

    # ---- writing

    def out(self, data: bytes) -> None:
        """Add bytes to the one send of this event-loop pass."""
        self._unsent.append(data)
        if not self._flushing:
            self._flushing = True
            self.loop.call_soon(self._flush)

    def send_h2_output(self) -> None:
        """Add the bytes that h2 has prepared to the send of this event-loop pass, after the bytes already queued."""
        data = self.h2.output()
        if data:
            self._control_bytes += len(data)
            self._control_writes += 1
            self.out(data)

    def queue_headers(self, id_bytes: bytes, fields: bytes, end: bool) -> None:
        """Queue a header block, in as many frames as the block needs."""
        if self._must_reset_table:
            self._must_reset_table = False
            fields = frames.NO_TABLE + fields
        self.out(frames.header_frames(id_bytes, fields, end_stream=end))

    def stop_sending(self, stream_id: int) -> None:
        """Reset a stream, so that the client stops sending the rest of the request."""
        with suppress(H2Error):
            self.h2.reset_stream(stream_id)
        self.send_h2_output()

    def _flush(self) -> None:
        self._flushing = False
        out, self._unsent = self._unsent, []
        data = b"".join(out)
        self._charges.earned_bytes += len(data) - self._control_bytes
        self._charges.earned_bytes -= FRAME_HEAD_BYTES * (len(out) - self._control_writes)
        self._control_bytes = self._control_writes = 0
        if self.transport.is_closing():
            return
        self.transport.write(data)
        most = self.limits.max_unsent_bytes if self.admitted else UNAUTHENTICATED_UNSENT_BYTES
        if self.transport.get_write_buffer_size() > most:
            self.abort("the client does not read what it is sent")

    def wait_for_window(self, call: ServerCall, *, of_stream: bool) -> None:
        """Register a call to be pushed when the send window of the call's stream (`of_stream`) or of the connection
        grows."""
        (self._blocked_streams if of_stream else self._blocked)[call.stream_id] = call

    def grow_window(self, size: int, stream_id: int | None = None) -> None:
        """Grow the receive window of a stream, or of the connection if `stream_id` is None, by `size` bytes."""
        if self.closing:
            return
        if stream_id is None:
            self._window_growth += size
            if self.admitted and self._window_growth < self.limits.connection_window_bytes // 4:
                return
            size, self._window_growth = self._window_growth, 0
        with suppress(H2Error, KeyError):  # the stream may have ended
            self.h2.increment_flow_control_window(size, stream_id)
        self.send_h2_output()

    # ---- events

    def _request_received(self, event: events.RequestReceived) -> None:
        stream_id, headers = event.stream_id, event.headers
        stream = self.h2.streams.get(stream_id)
        header_bytes = sum([len(name) + len(value) + 32 for name, value in headers])
        self._charges.charge_fields(header_bytes, self.loop.time())
        if stream is None:
            return
        fields = dict(headers)
        if stream_id > self._last_accepted or self._is_full(header_bytes):
            self._refuse_stream(stream_id)
            return
        if fields.get(b":method") != b"POST" or not fields.get(b"content-type", b"").startswith(b"application/grpc"):
            refused = ServerCall(self, stream, "", ())
            refused.half_closed = event.stream_ended is not None
            refused.refuse(b"415")
            self.h2.drop_closed(stream_id)
            self.charge_refusal()
            return
        path = fields.get(b":path", b"").decode("latin-1")
        problem, seconds = "", None
        metadata: Metadata = ()
        try:
            metadata = metadata_of(headers)
            seconds = timeout_s(fields[b"grpc-timeout"]) if b"grpc-timeout" in fields else None
        except ValueError as error:
            problem = str(error)
        deadline = None if seconds is None else self.loop.time() + seconds
        encoding = fields.get(b"grpc-encoding", b"identity").decode("latin-1")
        call = ServerCall(self, stream, path, metadata, deadline=deadline, encoding=encoding)
        call.header_bytes = header_bytes
        self._header_bytes += header_bytes
        self.calls[stream_id] = call
        self._server.start_call(call, encoding if encoding not in ENCODINGS else "", problem, seconds)

    def _is_full(self, header_bytes: int) -> bool:
        """Whether the connection has no room for another call."""
        most = UNAUTHENTICATED_HEADER_BYTES * (AUTHENTICATED_FACTOR if self.admitted else 1)
        return len(self.calls) >= self._max_calls or (bool(self.calls) and self._header_bytes + header_bytes > most)

    def _refuse_stream(self, stream_id: int) -> None:
        with suppress(H2Error):
            self.h2.reset_stream(stream_id, ErrorCodes.REFUSED_STREAM)
        self.h2.drop_closed(stream_id)
        self.charge_refusal()

    def _data(self, event: events.DataReceived) -> None:
        size = event.flow_controlled_length
        call = self.calls.get(event.stream_id)
        if call is None:
            self.grow_window(size)
            return
        self.data(call, event.data, size)

    def data(self, call: ServerCall, data: bytes, size: int) -> None:
        """Pass received request bytes to a call. `size`: number of bytes including padding."""
        try:
            call.received(data, size)
        except BadMessage as error:
            self.end_early(call, error)

    def _half_closed(self, event: events.StreamEnded) -> None:
        call = self.calls.get(event.stream_id)
        if call is not None:
            call.ended()

    def _reset(self, event: events.StreamReset) -> None:
        """Close a call that the client has reset, or that h2 has reset for a protocol error."""
        call = self.calls.get(event.stream_id)
        if call is not None:
            self._remove(call)
            call.close()
        self.h2.drop_closed(event.stream_id)
        self.charge_refusal(1.0 if event.remote_reset else CLIENT_FAULT)
        self._server.call_ended()

    def _window(self, event: events.WindowUpdated) -> None:
        self.window_opened(event.stream_id)

    def window_opened(self, stream_id: int | None) -> None:
        """Push the calls that waited for the send window of a stream, or of the connection if `stream_id` is 0 or
        None."""
        if stream_id:
            call = self._blocked_streams.pop(stream_id, None)
            if call is not None:
                call.push()
        else:
            self._push_blocked()

    def _push_blocked(self) -> None:
        """Push blocked calls while the connection's send window is open. Each call sends at least one byte, or begins
        to wait for the window of its stream."""
        blocked = self._blocked
        while blocked and self.h2.outbound_flow_control_window > 0:
            blocked.pop(next(iter(blocked))).push()

    def _settings(self, event: events.RemoteSettingsChanged) -> None:
        self._timers.greeted = True  # a client's settings directly follow its preface
        if SettingCodes.HEADER_TABLE_SIZE in event.changed_settings:
            self._must_reset_table = True
        blocked, self._blocked_streams = self._blocked_streams, {}
        for call in blocked.values():
            call.push()
        self._push_blocked()

    def _pong(self, event: events.PingAckReceived) -> None:
        self._timers.answered()

    def _goaway(self, event: events.ConnectionTerminated) -> None:
        """Handle the client's GOAWAY: take no further call. h2 would also end running calls; HTTP/2 lets running calls
        finish."""
        if not self.calls:
            self.close()
            return
        self.h2.state_machine.state = ConnectionState.SERVER_OPEN
        self._leaving = self._refusing = True
        self._last_accepted = max(self.calls)

    # ---- limits

    def admit(self, call: ServerCall, tenant: str | None) -> None:
        """Record that the gate has admitted a call. `tenant`: the call's tenant; None for a method that needs no
        credential.

        Raises BadMessage if too many calls without credentials are open."""
        call.admitted, call.tenant = True, tenant
        if tenant is None:
            self._anonymous_calls += 1
            self._anonymous_bytes += call.header_bytes
            if self._anonymous_calls > self.limits.anonymous_calls or self._anonymous_bytes > ANONYMOUS_HEADER_BYTES:
                raise BadMessage("too many calls without a credential are open on this connection", too_large=True)
        else:
            self._timers.served = True
        if tenant is not None and not self.admitted:
            self._raise_limits()
            for other in list(self.calls.values()):
                other.body.settle_connection()
        call.body.admit(tenant)

    def _raise_limits(self) -> None:
        limits, h2 = self.limits, self.h2
        self.admitted = True
        self._max_calls = limits.max_calls
        self._charges.admit(self.loop.time())
        self.intake.allow_frames(limits.frame_bytes)
        h2.note_resets(limits.max_calls)
        if self._server.gate is not None:
            h2.update_settings(
                {
                    SettingCodes.MAX_CONCURRENT_STREAMS: limits.max_calls,
                    SettingCodes.MAX_FRAME_SIZE: limits.frame_bytes,
                }
            )
        if (more := limits.connection_window_bytes - FIRST_WINDOW_BYTES) > 0:
            h2.increment_flow_control_window(more)
        self.send_h2_output()

    def charge_refusal(self, units: float = 1.0) -> None:
        """Charge a refused or reset call. Cut the connection if the connection's token bucket is empty."""
        if not self._charges.charge(units, self.loop.time()) and not self.closing:
            self.cut("too many resets or refused calls")

    def end_early(self, call: ServerCall, error: BadMessage) -> None:
        """End a call whose request is malformed, too large or too slow."""
        self._server.bad_message(call, error)
        self.charge_refusal(CLIENT_FAULT)

    def refuse(self, reason: str) -> None:
        """Close the connection, which violated HTTP/2. h2 has already prepared the GOAWAY."""
        self._server.note("connection_refused", self, reason)
        self.close()

    def cut(self, reason: str) -> None:
        """Close the connection with the error ENHANCE_YOUR_CALM, because the client exceeded a limit."""
        self._server.note("connection_cut", self, reason)
        with suppress(H2Error):
            self.h2.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
        self.close()

    def abort(self, reason: str) -> None:
        """Abort the connection and drop its unsent bytes."""
        if not self.transport.is_closing() or not self.closing:
            self._server.note("connection_cut", self, reason)
        self.closing = True
        self.transport.abort()

    # ---- lifetime

    @property
    def stage(self) -> ConnectionStage:
        """The connection's progress, for the connection table."""
        return (
            ConnectionStage.CALLING
            if self.calls
            else ConnectionStage.GREETED
            if self._timers.greeted
            else ConnectionStage.SILENT
        )

    @property
    def requests(self) -> int:
        """A number that grows with every call that begins on the connection."""
        return self.h2.highest_inbound_stream_id

    def mark_answering(self, path: str) -> None:
        """Handle the start of an answer: mark the client as authenticated, unless `path` is a health or reflection
        method."""
        if not path.startswith(_ANONYMOUS_PATHS):
            self._held.mark_authenticated()

    def mark_authenticated(self) -> None:
        """Mark the client as authenticated."""
        self._held.mark_authenticated()

    def evict(self) -> None:
        """Close the connection, because another connection takes its slot."""
        if self._held.authenticated:
            self.refuse_new_calls()
            self.close()
        if not self._held.authenticated or self.transport.get_write_buffer_size():
            self.transport.abort()

    def done(self, call: ServerCall) -> None:
        """Remove a call whose status has been sent."""
        if self._remove(call):
            if call.timer is not None:
                call.timer.cancel()
            call.drop_request()
            self.h2.drop_closed(call.stream_id)
            self._server.call_ended()
        if self._refusing and not self.calls:
            self.close()

    def reset(self, call: ServerCall) -> None:
        """Reset a call whose client does not read."""
        with suppress(H2Error):
            self.h2.reset_stream(call.stream_id, ErrorCodes.CANCEL)
        self.send_h2_output()
        call.closed = True
        call.wake_writers()
        self.done(call)

    def leave(self, grace_s: float = 0.0) -> None:
        """Ask the client to reconnect. The connection closes after its last call, or at the latest after `grace_s`
        seconds.

        If `grace_s` is 0 there is no time limit, and the caller closes the connection."""
        if self._leaving:
            return
        self._leaving = True
        self._send_goaway(MAX_STREAM_ID)  # calls that the client has already sent are still accepted (RFC 9113, 6.8)
        self.call_later(1.0, self.refuse_new_calls)
        if grace_s:
            self.call_later(grace_s, self.close)

    def refuse_new_calls(self) -> None:
        """Accept no further call, and send the client the id of the last accepted stream."""
        if self._refusing or self.transport.is_closing():
            return
        self._refusing = True
        self._last_accepted = self.h2.highest_inbound_stream_id
        self._send_goaway(self._last_accepted)
        if not self.calls:
            self.close()

    def _send_goaway(self, last: int) -> None:
        """Send a GOAWAY that is not made by h2: h2 sends nothing after its own GOAWAY."""
        self.out(GoAwayFrame(0, last_stream_id=last, error_code=0).serialize())

    def close(self) -> None:
        """Flush and close the connection. Bytes received from now on are ignored."""
        self.closing = True
        self.intake.clear()
        self.send_h2_output()
        if self._unsent:
            self._flush()
        if not self.transport.is_closing():
            self.transport.close()
            self._timers.closing()

    def _remove(self, call: ServerCall) -> bool:
        if self.calls.pop(call.stream_id, None) is None:
            return False
        self._blocked.pop(call.stream_id, None)
        self._blocked_streams.pop(call.stream_id, None)
        self._header_bytes -= call.header_bytes
        if call.admitted and call.tenant is None:
            self._anonymous_calls -= 1
            self._anonymous_bytes -= call.header_bytes
        if not self.calls and (call.admitted or self._timers.served):  # refused calls do not restart the idle time
            self._timers.start_idle()
        return True

    def call_later(self, seconds: float, work: Callable[..., None]) -> None:
        """Call `work` after `seconds`, unless the connection is lost before then."""
        self._timers.call_later(seconds, work)

    def _refuse_http1(self) -> None:
        self.closing = True
        self._unsent.clear()
        self.transport.write(_HTTP1_ANSWER)
        self.transport.close()


_EVENTS: dict[type[events.Event], Callable[[Connection, Any], None]] = {
    events.RequestReceived: Connection._request_received,
    events.DataReceived: Connection._data,
    events.StreamEnded: Connection._half_closed,
    events.StreamReset: Connection._reset,
    events.WindowUpdated: Connection._window,
    events.RemoteSettingsChanged: Connection._settings,
    events.PingAckReceived: Connection._pong,
    events.ConnectionTerminated: Connection._goaway,
}


def _peer(name: Any) -> str:
    if not isinstance(name, tuple):
        return "unix:"
    return f"ipv6:[{name[0]}]:{name[1]}" if ":" in str(name[0]) else f"ipv4:{name[0]}:{name[1]}"
