"""One HTTP/2 connection of a client: h2 keeps the protocol's state, this keeps its calls, its bounds and its writes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, cast

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
from cluster.http2.frame_costs import WRONG, Charges
from cluster.http2.frame_intake import FrameIntake
from cluster.http2.frame_reader import FrameReader
from cluster.http2.h2_state import Http2State
from cluster.http2.limits import FIRST_WINDOW_BYTES, ServerLimits
from cluster.http2.messages import ENCODINGS, BadMessage, Metadata, metadata_of, timeout_s
from cluster.http2.request_body import Budget
from cluster.http2.reset_streams import EndedStreams
from cluster.http2.timeouts import ConnectionTimers

if TYPE_CHECKING:
    from cluster.http2.connection_table import Held
    from cluster.http2.server import Server

log = structlog.get_logger("rpc")

_HTTP1 = (b"GET ", b"POST", b"PUT ", b"HEAD", b"OPTI", b"DELE", b"CONN", b"PATC")
_HTTP1_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n"
    b"this port speaks gRPC (HTTP/2); OpenAI's HTTP API is on the gateway's http port\n"
)
_OPEN_TO_STRANGERS = ("/grpc.health.", "/grpc.reflection.")
MAX_STREAM_ID: Final = 2**31 - 1
FRAME_HEAD_BYTES: Final = 9
STRANGER_FRAME_BYTES: Final = 16_384
"""The largest frame before a call was admitted; the least that HTTP/2 allows."""
STRANGER_RESETS_NOTED: Final = 128
STRANGER_HEADER_BYTES: Final = 131_072
"""Header fields of all open calls of a connection without an admitted one."""
UNNAMED_HEADER_BYTES: Final = 16_384
"""Of these, of calls of methods that need no credential."""
KNOWN_TIMES: Final = 32
"""So many times as much once there is one."""
STRANGER_UNSENT_BYTES: Final = 1 << 20
# Where the next bytes of any connection are read to: as much as one takes of the loop at a time. asyncio's own read of
# 256 KiB, and what h2 does with it, held the loop for 20 ms when many long prompts came at once.
_READ = memoryview(bytearray(65_536))
_READ_OF_STRANGER = _READ[:STRANGER_FRAME_BYTES]


class Connection(asyncio.BufferedProtocol):
    """A client's connection."""

    __slots__ = (
        "_age_s",
        "_blocked",
        "_blocked_streams",
        "_charges",
        "_control_bytes",
        "_control_writes",
        "_flushing",
        "_header_bytes",
        "_held",
        "_last",
        "_last_taken",
        "_leaving",
        "_liveness",
        "_max_calls",
        "_server",
        "_table_is_news",
        "_to_give",
        "_unnamed_bytes",
        "_unnamed_calls",
        "_unsent",
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
    )  # with more than 30 attributes a dictionary would make each access slower

    def __init__(self, server: Server, limits: ServerLimits, age_s: float, held: Held) -> None:
        """`age_s`: this connection's own age limit, 0 for none. `held`: its place among the port's connections."""
        self._held = held
        self.loop = asyncio.get_running_loop()
        self.limits = limits
        self.budget: Budget | None = server.budget
        self.h2 = Http2State(EndedStreams(STRANGER_RESETS_NOTED))
        self.peer = ""
        self.paused = False
        self.admitted = False
        """A call of this connection has shown a credential that was accepted, or the server asks for none."""
        self.calls: dict[int, ServerCall] = {}
        self.transport: asyncio.Transport
        self._server = server
        self._age_s = age_s
        self._charges = Charges(limits, self.loop.time())
        reader = FrameReader(STRANGER_FRAME_BYTES, limits.max_header_bytes)
        self.intake = FrameIntake(self, reader, self._charges, server.turns)
        self._liveness = ConnectionTimers(self)
        self._unsent: list[bytes] = []
        self._flushing = False
        """Whether `_unsent` goes out in this pass of the event loop."""
        self._control_bytes = self._control_writes = 0
        """Of what is to be sent: all that is not an answer to a call."""
        self._to_give = 0
        """Bytes that the connection's window is to get back."""
        self._max_calls = limits.max_calls if server.gate is None else min(limits.stranger_calls, limits.max_calls)
        self._header_bytes = self._unnamed_calls = self._unnamed_bytes = 0
        self._table_is_news = True
        self._blocked: dict[int, ServerCall] = {}
        """Calls that wait for the window of the connection, in turn."""
        self._blocked_streams: dict[int, ServerCall] = {}
        self.closing = False
        """Nothing more of the client is handled."""
        self._leaving = self._last = False
        self._last_taken = MAX_STREAM_ID

    # ---- asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Introduce ourselves."""
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
                SettingCodes.MAX_FRAME_SIZE: limits.frame_bytes if known else STRANGER_FRAME_BYTES,
            },
        )
        h2.decoder.max_header_list_size = limits.max_header_bytes
        h2.initiate_connection()
        if known:
            self._raise_limits()
        self.out_of_h2()
        self._liveness.begin(self._age_s)
        self._server.connections.add(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to read to."""
        return _READ if self.admitted else _READ_OF_STRANGER

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes of the client."""
        if self.closing:
            return
        if not self._liveness.greeted and bytes(_READ[:4]) in _HTTP1:
            self._refuse_http1()
            return
        self.intake.feed(_READ[:nbytes])

    def handle(self, frame: Frame) -> None:
        """A frame that was charged. Raises H2Error."""
        received = self.h2.receive_frame(frame)
        if type(frame) is SettingsFrame:
            # New settings count at once, so their confirmation goes before anything that they allow: until it has come
            # a client takes a larger frame, or more than the old window, for a fault, and resets the stream.
            self.out_of_h2()
        for event in received:
            handle = _EVENTS.get(type(event))
            if handle is not None and not self.closing:
                handle(self, event)

    def connection_lost(self, error: Exception | None) -> None:
        """The client is gone, and so are its calls."""
        self.closing = True
        self._held.release()
        self._liveness.end()
        self._server.connections.discard(self)
        calls, self.calls = list(self.calls.values()), {}
        self._blocked.clear()
        self._blocked_streams.clear()
        self.intake.clear()
        for call in calls:
            call.close()
        self._server.left()

    def pause_writing(self) -> None:
        """The client does not read."""
        self.paused = True

    def resume_writing(self) -> None:
        """It reads again."""
        self.paused = False
        for call in list(self.calls.values()):
            call.wake_writers()

    # ---- writing

    def out(self, data: bytes) -> None:
        """Send with all else of this pass of the event loop."""
        self._unsent.append(data)
        if not self._flushing:
            self._flushing = True
            self.loop.call_soon(self._flush)

    def out_of_h2(self) -> None:
        """Send what h2 has to say, in its place among what is sent already."""
        data = self.h2.output()
        if data:
            self._control_bytes += len(data)
            self._control_writes += 1
            self.out(data)

    def out_headers(self, tail: bytes, fields: bytes, end: bool) -> None:
        """Send a block of header fields in its frames."""
        if self._table_is_news:
            self._table_is_news = False
            fields = frames.NO_TABLE + fields
        self.out(frames.header_frames(tail, fields, end_stream=end))

    def stop_sending(self, stream_id: int) -> None:
        """Tell the client that nobody will read the rest of its request."""
        with suppress(H2Error):
            self.h2.reset_stream(stream_id)
        self.out_of_h2()

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
        most = self.limits.max_unsent_bytes if self.admitted else STRANGER_UNSENT_BYTES
        if self.transport.get_write_buffer_size() > most:
            self.abort("it does not read")

    def wait_for_window(self, call: ServerCall, *, of_stream: bool) -> None:
        """Push this call when the client's window of its stream, or of the connection, opens."""
        (self._blocked_streams if of_stream else self._blocked)[call.stream_id] = call

    def give(self, size: int, stream_id: int | None = None) -> None:
        """Let the client send so many bytes more, on a stream or on the connection."""
        if self.closing:
            return
        if stream_id is None:
            self._to_give += size
            if self.admitted and self._to_give < self.limits.connection_window_bytes // 4:
                return
            size, self._to_give = self._to_give, 0
        with suppress(H2Error, KeyError):  # the stream has ended meanwhile
            self.h2.increment_flow_control_window(size, stream_id)
        self.out_of_h2()

    # ---- events

    def _opened(self, event: events.RequestReceived) -> None:
        stream_id, headers = event.stream_id, event.headers
        stream = self.h2.streams.get(stream_id)
        header_bytes = sum([len(name) + len(value) + 32 for name, value in headers])
        self._charges.fields(header_bytes, self.loop.time())
        if stream is None:
            return
        fields = dict(headers)
        if stream_id > self._last_taken or self._full(header_bytes):
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
        self._server.opened(call, encoding if encoding not in ENCODINGS else "", problem, seconds)

    def _full(self, header_bytes: int) -> bool:
        """Whether the open calls leave no room for another."""
        most = STRANGER_HEADER_BYTES * (KNOWN_TIMES if self.admitted else 1)
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
            self.give(size)
            return
        self.data(call, event.data, size)

    def data(self, call: ServerCall, data: bytes, size: int) -> None:
        """Bytes of a call's request, `size` with padding."""
        try:
            call.received(data, size)
        except BadMessage as error:
            self.end_early(call, error)

    def _half_closed(self, event: events.StreamEnded) -> None:
        call = self.calls.get(event.stream_id)
        if call is not None:
            call.ended()

    def _reset(self, event: events.StreamReset) -> None:
        """By the client, or by h2 for what the client has sent."""
        call = self.calls.get(event.stream_id)
        if call is not None:
            self._remove(call)
            call.close()
        self.h2.drop_closed(event.stream_id)
        self.charge_refusal(1.0 if event.remote_reset else WRONG)
        self._server.left()

    def _window(self, event: events.WindowUpdated) -> None:
        self.window_opened(event.stream_id)

    def window_opened(self, stream_id: int | None) -> None:
        """The client takes more, of a stream or of the connection."""
        if stream_id:
            call = self._blocked_streams.pop(stream_id, None)
            if call is not None:
                call.push()
        else:
            self._push_blocked()

    def _push_blocked(self) -> None:
        """Each sends at least a byte, or waits for its stream's window or no longer."""
        blocked = self._blocked
        while blocked and self.h2.outbound_flow_control_window > 0:
            blocked.pop(next(iter(blocked))).push()

    def _settings(self, event: events.RemoteSettingsChanged) -> None:
        self._liveness.greeted = True  # they follow the preface at once
        if SettingCodes.HEADER_TABLE_SIZE in event.changed_settings:
            self._table_is_news = True
        blocked, self._blocked_streams = self._blocked_streams, {}
        for call in blocked.values():
            call.push()
        self._push_blocked()

    def _pong(self, event: events.PingAckReceived) -> None:
        self._liveness.answered()

    def _goaway(self, event: events.ConnectionTerminated) -> None:
        """The client opens no more calls; h2 would also end those that run, HTTP/2 does not."""
        if not self.calls:
            self.close()
            return
        self.h2.state_machine.state = ConnectionState.SERVER_OPEN
        self._leaving = self._last = True
        self._last_taken = max(self.calls)

    # ---- bounds

    def admit(self, call: ServerCall, tenant: str | None) -> None:
        """The server's gate has let a call in, as one of this tenant, or of nobody's. Raises BadMessage."""
        call.admitted, call.tenant = True, tenant
        if tenant is None:
            self._unnamed_calls += 1
            self._unnamed_bytes += call.header_bytes
            if self._unnamed_calls > self.limits.stranger_open_calls or self._unnamed_bytes > UNNAMED_HEADER_BYTES:
                raise BadMessage("too many calls without a credential on this connection", too_large=True)
        else:
            self._liveness.served = True
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
        self.out_of_h2()

    def charge_refusal(self, units: float = 1.0) -> None:
        """A call was refused or reset."""
        if not self._charges.heavy(units, self.loop.time()) and not self.closing:
            self.cut("too many resets or refused calls")

    def end_early(self, call: ServerCall, error: BadMessage) -> None:
        """What a client has sent is no message, too large or too slow."""
        self._server.bad_message(call, error)
        self.charge_refusal(WRONG)

    def refuse(self, reason: str) -> None:
        """What the client has sent is no HTTP/2; h2 has its GOAWAY ready."""
        self._server.note("connection_refused", self, reason)
        self.close()

    def cut(self, reason: str) -> None:
        """End the connection of a client that costs too much."""
        self._server.note("connection_cut", self, reason)
        with suppress(H2Error):
            self.h2.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
        self.close()

    def abort(self, reason: str) -> None:
        """Drop the connection, and what it has not read."""
        if not self.transport.is_closing() or not self.closing:
            self._server.note("connection_cut", self, reason)
        self.closing = True
        self.transport.abort()

    # ---- life

    @property
    def stage(self) -> ConnectionStage:
        """How far the connection has come."""
        return (
            ConnectionStage.CALLING
            if self.calls
            else ConnectionStage.GREETED
            if self._liveness.greeted
            else ConnectionStage.SILENT
        )

    @property
    def requests(self) -> int:
        """Calls that have begun."""
        return self.h2.highest_inbound_stream_id

    def answers(self, path: str) -> None:
        """A handler answers a call with more than an error: its client has shown what the method wants."""
        if not path.startswith(_OPEN_TO_STRANGERS):
            self._held.prove()

    def prove(self) -> None:
        """The client has shown a credential that was accepted."""
        self._held.prove()

    def shed(self) -> None:
        """End the connection: its place is another's."""
        if self._held.proven:
            self.last_call()
            self.close()
        if not self._held.proven or self.transport.get_write_buffer_size():
            self.transport.abort()

    def done(self, call: ServerCall) -> None:
        """A call's end has been sent."""
        if self._remove(call):
            if call.timer is not None:
                call.timer.cancel()
            call.drop_request()
            self.h2.drop_closed(call.stream_id)
            self._server.left()
        if self._last and not self.calls:
            self.close()

    def reset(self, call: ServerCall) -> None:
        """Cut a call whose client does not read."""
        with suppress(H2Error):
            self.h2.reset_stream(call.stream_id, ErrorCodes.CANCEL)
        self.out_of_h2()
        call.closed = True
        call.wake_writers()
        self.done(call)

    def leave(self, grace_s: float = 0.0) -> None:
        """Ask the client to open another connection; this one ends with its last call, or after the grace (0: then
        whoever asked for it ends it)."""
        if self._leaving:
            return
        self._leaving = True
        self._say_goaway(MAX_STREAM_ID)  # those under way are taken still (RFC 9113, 6.8)
        self.later(1.0, self.last_call)
        if grace_s:
            self.later(grace_s, self.close)

    def last_call(self) -> None:
        """From now on no further call is taken; the client knows which ones were."""
        if self._last or self.transport.is_closing():
            return
        self._last = True
        self._last_taken = self.h2.highest_inbound_stream_id
        self._say_goaway(self._last_taken)
        if not self.calls:
            self.close()

    def _say_goaway(self, last: int) -> None:
        """By hand: after h2's own nothing may be sent any more."""
        self.out(GoAwayFrame(0, last_stream_id=last, error_code=0).serialize())

    def close(self) -> None:
        """Send what is to be sent, and end the connection. Nothing more of the client is handled."""
        self.closing = True
        self.intake.clear()
        self.out_of_h2()
        if self._unsent:
            self._flush()
        if not self.transport.is_closing():
            self.transport.close()
            self._liveness.closing()

    def _remove(self, call: ServerCall) -> bool:
        if self.calls.pop(call.stream_id, None) is None:
            return False
        self._blocked.pop(call.stream_id, None)
        self._blocked_streams.pop(call.stream_id, None)
        self._header_bytes -= call.header_bytes
        if call.admitted and call.tenant is None:
            self._unnamed_calls -= 1
            self._unnamed_bytes -= call.header_bytes
        if not self.calls and (call.admitted or self._liveness.served):  # refusals keep no stranger's connection
            self._liveness.rests()
        return True

    def later(self, seconds: float, work: Callable[..., None]) -> None:
        """Call `work` unless the connection is lost before."""
        self._liveness.later(seconds, work)

    def _refuse_http1(self) -> None:
        self.closing = True
        self._unsent.clear()
        self.transport.write(_HTTP1_ANSWER)
        self.transport.close()


_EVENTS: dict[type[events.Event], Callable[[Connection, Any], None]] = {
    events.RequestReceived: Connection._opened,
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
