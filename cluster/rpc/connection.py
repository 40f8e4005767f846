"""One HTTP/2 connection of a client: h2 keeps the protocol's state, this keeps its calls, its bounds and its writes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import structlog
from h2 import events
from h2.config import H2Configuration
from h2.connection import ConnectionState, H2Connection
from h2.errors import ErrorCodes
from h2.exceptions import H2Error
from h2.settings import SettingCodes
from hyperframe.frame import GoAwayFrame

from cluster.rpc import frames
from cluster.rpc.ended import EndedStreams
from cluster.rpc.limits import Limits
from cluster.rpc.messages import ENCODINGS, BadMessage, Metadata, metadata_of, timeout_s
from cluster.rpc.rpc import Rpc

if TYPE_CHECKING:
    from cluster.rpc.connection_table import Held
    from cluster.rpc.server import Server

log = structlog.get_logger("rpc")

_HTTP1 = (b"GET ", b"POST", b"PUT ", b"HEAD", b"OPTI", b"DELE", b"CONN", b"PATC")
_HTTP1_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n"
    b"this port speaks gRPC (HTTP/2); OpenAI's HTTP API is on the gateway's http port\n"
)
_OPEN_TO_STRANGERS = ("/grpc.health.", "/grpc.reflection.")
MAX_STREAM_ID = 2**31 - 1
# Of a request's headers only those are looked at that a call needs; nothing is handed on to another server.
_CONFIGURATION = H2Configuration(
    client_side=False,
    header_encoding=None,
    validate_inbound_headers=False,
    normalize_inbound_headers=False,
)


# Where the next bytes of any connection are read to: as much as one takes of the loop at a time. asyncio's own read of
# 256 KiB, and what h2 does with it, held the loop for 20 ms when many long prompts came at once.
_READ = memoryview(bytearray(65_536))
LARGE_BYTES = 16_384
"""So many at once wait their turn (read_turns.py)."""


class Connection(asyncio.BufferedProtocol):
    """A client's connection."""

    def __init__(self, server: Server, limits: Limits, age_s: float, held: Held) -> None:
        """`age_s`: this connection's own age limit, 0 for none. `held`: its place among the port's connections."""
        self._held = held
        self.loop = asyncio.get_running_loop()
        self.limits = limits
        self.h2 = H2Connection(_CONFIGURATION)
        self.peer = ""
        self.paused = False
        self.calls: dict[int, Rpc] = {}
        self.transport: asyncio.Transport
        self._server = server
        self._age_s = age_s
        self._out: list[bytes] = []
        self._flushing = False
        self._unread = 0
        self._table_is_news = True
        self._waiting: dict[int, Rpc] = {}
        self._greeted = False
        self._leaving = self._last = False
        self._last_taken = MAX_STREAM_ID
        self._timers: list[asyncio.TimerHandle] = []
        self._answered = True
        self._allowance = limits.resets_burst
        self._allowance_at = self.loop.time()

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
        h2.local_settings = type(h2.local_settings)(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: limits.max_calls,
                SettingCodes.MAX_HEADER_LIST_SIZE: limits.max_header_bytes,
                SettingCodes.INITIAL_WINDOW_SIZE: limits.window_bytes,
                SettingCodes.MAX_FRAME_SIZE: limits.frame_bytes,
            },
        )
        h2._closed_streams = EndedStreams(limits.max_calls)  # by h2's own name for it
        h2.decoder.max_header_list_size = limits.max_header_bytes
        h2.max_inbound_frame_size = limits.frame_bytes
        h2.initiate_connection()
        if (more := 4 * limits.window_bytes - 65_535) > 0:  # what HTTP/2 begins with
            h2.increment_flow_control_window(more)
        self.out_of_h2()
        self._later(limits.hello_s, self._expect_hello)
        self._later(limits.ping_s, self._ping)
        if self._age_s:
            self._later(self._age_s, self._grow_old)
        self._server.connections.add(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to read to."""
        return _READ

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes of the client."""
        data = bytes(_READ[:nbytes])
        if nbytes < LARGE_BYTES and not self._unread:
            self._received(data)
            return
        self._unread += 1
        self.transport.pause_reading()
        self._server.turns.put(self, data)

    def take(self, data: bytes) -> None:
        """Bytes whose turn has come."""
        self._unread -= 1
        if self not in self._server.connections:
            return
        try:
            self._received(data)
        except BaseException:  # as the transport does when it hands on itself
            self.transport.abort()
            raise
        if not self._unread:
            self.transport.resume_reading()

    def _received(self, data: bytes) -> None:
        if not self._greeted and data[:4] in _HTTP1:
            self._refuse_http1()
            return
        try:
            received = self.h2.receive_data(data)
            # New settings count at once, so their confirmation goes before anything that they allow: until it has come
            # a client takes a larger frame, or more than the old window, for a fault, and resets the stream.
            self.out_of_h2()
            for event in received:
                handle = _EVENTS.get(type(event))
                if handle is not None:
                    handle(self, event)
        except H2Error as error:
            log.info("connection_refused", peer=self.peer, reason=str(error) or type(error).__name__)
            self.out_of_h2()
            self.close()
            return
        self.out_of_h2()

    def connection_lost(self, error: Exception | None) -> None:
        """The client is gone, and so are its calls."""
        self._held.release()
        for timer in self._timers:
            timer.cancel()
        self._server.connections.discard(self)
        calls, self.calls = list(self.calls.values()), {}
        self._waiting.clear()
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
        self._out.append(data)
        if not self._flushing:
            self._flushing = True
            self.loop.call_soon(self._flush)

    def out_of_h2(self) -> None:
        """Send what h2 has to say, in its place among what is sent already."""
        data = self.h2.data_to_send()
        if data:
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
        out, self._out = self._out, []
        if self.transport.is_closing():
            return
        self.transport.write(b"".join(out))
        if self.transport.get_write_buffer_size() > self.limits.max_unsent_bytes:
            log.warning("connection_cut", peer=self.peer, reason="it does not read")
            self.transport.abort()

    def wait_for_window(self, call: Rpc) -> None:
        """Push this call when the client's window opens."""
        self._waiting[call.stream_id] = call

    def consumed(self, stream_id: int, size: int) -> None:
        """A handler has read so many bytes of a message and its prefix: the client may send as much again."""
        self._acknowledge(stream_id, size)
        self.out_of_h2()

    def _acknowledge(self, stream_id: int, size: int) -> None:
        with suppress(H2Error):  # the connection has ended meanwhile
            self.h2.acknowledge_received_data(size, stream_id)

    # ---- events

    def _opened(self, event: events.RequestReceived) -> None:
        stream_id = event.stream_id
        headers = event.headers
        fields = dict(headers)
        stream = self.h2.streams.get(stream_id)
        if stream is None:  # reset in the same bytes
            return
        if fields.get(b":method") != b"POST" or not fields.get(b"content-type", b"").startswith(b"application/grpc"):
            refused = Rpc(self, stream, "", ())
            refused.half_closed = True
            refused.refuse(b"415")
            return
        if stream_id > self._last_taken:
            with suppress(H2Error):
                self.h2.reset_stream(stream_id, ErrorCodes.REFUSED_STREAM)
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
        call = Rpc(self, stream, path, metadata, deadline=deadline, encoding=encoding)
        self.calls[stream_id] = call
        self._server.opened(call, encoding if encoding not in ENCODINGS else "", problem, seconds)

    def _data(self, event: events.DataReceived) -> None:
        stream_id, size = event.stream_id, event.flow_controlled_length
        call = self.calls.get(stream_id)
        if call is None:
            if size:
                self._acknowledge(stream_id, size)
            return
        acknowledged, unread = call.assembler.held_bytes, 0
        try:
            for message, on_wire in call.assembler.add(event.data):
                # What a streaming handler has not read stays unacknowledged, so that the window bounds it. A message
                # may be larger than the window: its parts are acknowledged as they come, max_message_bytes bounds it.
                waits = on_wire - acknowledged if call.deserializer is not None else 0
                call.received(message, waits)
                acknowledged, unread = 0, unread + waits
        except BadMessage as error:
            self._server.bad_message(call, error)
        if size > unread:
            self._acknowledge(stream_id, size - unread)

    def _half_closed(self, event: events.StreamEnded) -> None:
        call = self.calls.get(event.stream_id)
        if call is not None:
            call.ended()
            self._server.half_closed(call)

    def _reset(self, event: events.StreamReset) -> None:
        call = self.calls.pop(event.stream_id, None)
        if call is not None:
            self._waiting.pop(call.stream_id, None)
            call.close()
        if event.remote_reset:
            self._charge()
        self._server.left()

    def _window(self, event: events.WindowUpdated) -> None:
        if event.stream_id:
            call = self._waiting.pop(event.stream_id, None)
            if call is not None:
                call.push()
        else:
            self._push_all()

    def _settings(self, event: events.RemoteSettingsChanged) -> None:
        self._greeted = True  # they follow the preface at once
        self._charge()
        if SettingCodes.HEADER_TABLE_SIZE in event.changed_settings:
            self._table_is_news = True
        self._push_all()

    def _push_all(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for call in waiting.values():
            call.push()

    def _pinged(self, event: events.PingReceived) -> None:
        self._charge()

    def _pong(self, event: events.PingAckReceived) -> None:
        self._answered = True

    def _goaway(self, event: events.ConnectionTerminated) -> None:
        """The client opens no more calls; h2 would also end those that run, HTTP/2 does not."""
        if not self.calls:
            self.close()
            return
        self.h2.state_machine.state = ConnectionState.SERVER_OPEN
        self._leaving = self._last = True
        self._last_taken = max(self.calls)

    def _charge(self) -> None:
        now = self.loop.time()
        limits = self.limits
        refill = (now - self._allowance_at) * limits.resets_per_s
        self._allowance = min(self._allowance + refill, limits.resets_burst) - 1
        self._allowance_at = now
        if self._allowance < 0:
            log.warning("connection_cut", peer=self.peer, reason="too many resets, pings or settings")
            self.h2.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
            self.out_of_h2()
            self.close()

    # ---- life

    @property
    def busy(self) -> bool:
        """Whether a call is under way."""
        return bool(self.calls)

    @property
    def requests(self) -> int:
        """Calls that have begun."""
        return self.h2.highest_inbound_stream_id

    def answers(self, path: str) -> None:
        """A handler answers a call with more than an error: its client has shown what the method wants."""
        if not path.startswith(_OPEN_TO_STRANGERS):
            self._held.prove()

    def shed(self) -> None:
        """End the connection: its place is another's."""
        if self._held.proven:
            self.last_call()
            self.close()
        if not self._held.proven or self.transport.get_write_buffer_size():
            self.transport.abort()

    def done(self, call: Rpc) -> None:
        """A call's end has been sent."""
        if self.calls.pop(call.stream_id, None) is not None:
            if call.timer is not None:
                call.timer.cancel()
            self._waiting.pop(call.stream_id, None)
            self._server.left()
        if self._last and not self.calls:
            self.close()

    def reset(self, call: Rpc) -> None:
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
        self._later(1.0, self.last_call)
        if grace_s:
            self._later(grace_s, self.close)

    def _grow_old(self) -> None:
        self.leave(self.limits.age_grace_s)

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
        """Send what is to be sent, and end the connection."""
        if self._out:
            self._flush()
        if not self.transport.is_closing():
            self.transport.close()

    def _later(self, seconds: float, work: Callable[[], None]) -> None:
        now = self.loop.time()
        self._timers = [t for t in self._timers if t.when() > now and not t.cancelled()]
        self._timers.append(self.loop.call_later(seconds, work))

    def _expect_hello(self) -> None:
        if not self._greeted:
            self.transport.abort()

    def _ping(self) -> None:
        if not self.calls:
            self._later(self.limits.ping_s, self._ping)
            return
        self._answered = False
        self.h2.ping(int(time.monotonic()).to_bytes(8, "big"))
        self.out_of_h2()
        self._later(self.limits.ping_answer_s, self._expect_pong)

    def _expect_pong(self) -> None:
        if not self._answered:
            log.info("connection_cut", peer=self.peer, reason="no answer to a ping")
            self.transport.abort()
            return
        self._later(self.limits.ping_s, self._ping)

    def _refuse_http1(self) -> None:
        self._out.clear()
        self.transport.write(_HTTP1_ANSWER)
        self.transport.close()


_EVENTS: dict[type[events.Event], Callable[[Connection, Any], None]] = {
    events.RequestReceived: Connection._opened,
    events.DataReceived: Connection._data,
    events.StreamEnded: Connection._half_closed,
    events.StreamReset: Connection._reset,
    events.WindowUpdated: Connection._window,
    events.RemoteSettingsChanged: Connection._settings,
    events.PingReceived: Connection._pinged,
    events.PingAckReceived: Connection._pong,
    events.ConnectionTerminated: Connection._goaway,
}


def _peer(name: Any) -> str:
    if not isinstance(name, tuple):
        return "unix:"
    return f"ipv6:[{name[0]}]:{name[1]}" if ":" in str(name[0]) else f"ipv4:{name[0]}:{name[1]}"
