"""The bytes that a connection sends, in one write for each event-loop pass, and the flow-control windows that limit
them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from h2.errors import ErrorCodes
from h2.exceptions import H2Error
from hyperframe.frame import GoAwayFrame

from cluster.http2 import frames
from cluster.http2.connection_table import ConnectionSlot
from cluster.http2.h2_state import EndedStreams, Http2State, ServerState
from cluster.http2.limits import FIRST_WINDOW_BYTES, Budget, ServerLimits

UNAUTHENTICATED_UNSENT_BYTES: Final = 1 << 20
"""Maximum number of bytes that may wait for the client on a connection without an admitted call."""
UNAUTHENTICATED_RESETS_NOTED: Final = 128


class ConnectionOutput:
    """The unsent bytes of one connection. Once the output is closed or aborted, nothing more is sent or received."""

    def __init__(
        self, transport: asyncio.Transport, h2: Http2State, on_unread: Callable[[], None] | None = None
    ) -> None:
        """`on_unread`: called when the other side leaves more bytes unread than it may; None: no limit."""
        self._transport = transport
        self._h2 = h2
        self._loop = asyncio.get_running_loop()
        self._on_unread = on_unread
        self._max_unsent_bytes = UNAUTHENTICATED_UNSENT_BYTES
        self._unsent: list[bytes] = []
        self._flushing = False
        """Whether a flush of `_unsent` is scheduled for this event-loop pass."""
        self._before_flush: list[Callable[[], None]] = []
        self._control_bytes = self._control_writes = 0
        """Numbers of bytes and writes of control frames in `_unsent`, that is, without the answers to calls."""
        self._must_reset_table = True
        self.payload_bytes = 0
        """Number of bytes sent in answers to calls, without the heads of frames."""
        self.paused = False
        """Whether the other side does not read."""
        self.closed = False
        """Whether the connection is being closed. Received bytes are ignored from then on."""

    def write(self, data: bytes) -> None:
        """Queue bytes. All bytes that are queued in one event-loop pass are sent together."""
        self._unsent.append(data)
        if not self._flushing:
            self._schedule_flush()

    def call_before_flush(self, function: Callable[[], None]) -> None:
        """Call a function, which may queue bytes, before the queued bytes are sent. Code that gathers bytes during an
        event-loop pass can use this method instead of scheduling a callback."""
        self._before_flush.append(function)
        if not self._flushing:
            self._schedule_flush()

    def _schedule_flush(self) -> None:
        self._flushing = True
        self._loop.call_soon(self._flush)

    def write_h2(self) -> None:
        """Queue the bytes that h2 has prepared, behind the bytes that are already queued. All are sent in this
        event-loop pass."""
        data = self._h2.output()
        if data:
            self._control_bytes += len(data)
            self._control_writes += 1
            self.write(data)

    def write_headers(self, id_bytes: bytes, fields: bytes, end: bool) -> None:
        """Queue a header block, in as many frames as the block needs."""
        if self._must_reset_table:
            self._must_reset_table = False
            fields = frames.NO_TABLE + fields
        self.write(frames.header_frames(id_bytes, fields, end_stream=end))

    def reset_table(self) -> None:
        """Make the next header block tell the client again that the size of the HPACK dynamic table is zero."""
        self._must_reset_table = True

    def write_goaway(self, last: int) -> None:
        """Queue a GOAWAY frame without h2, because h2 sends nothing more after its own GOAWAY. `last`: id of the last
        stream that is accepted."""
        self.write(GoAwayFrame(0, last_stream_id=last, error_code=0).serialize())

    def reset_stream(self, stream_id: int, code: ErrorCodes = ErrorCodes.NO_ERROR) -> None:
        """Reset a stream. Does nothing if h2 has no such stream."""
        with suppress(H2Error):
            self._h2.reset_stream(stream_id, code)
        self.write_h2()

    def allow_unsent(self, size: int) -> None:
        """Set the number of unsent bytes that may wait for the client."""
        self._max_unsent_bytes = size

    def pause(self, paused: bool) -> None:
        """Record whether the other side has stopped reading."""
        self.paused = paused

    def close(self) -> None:
        """Send the remaining bytes, and close the transport once the client has read them. Idempotent."""
        self.closed = True
        self.write_h2()
        self._flush()
        self._transport.close()

    def close_with(self, data: bytes) -> None:
        """Send `data` in place of the unsent bytes, and close the transport."""
        self.closed = True
        self._unsent.clear()
        self._transport.write(data)
        self._transport.close()

    def abort(self) -> None:
        """Abort the transport and drop the unsent bytes. Idempotent."""
        self.closed = True
        self._transport.abort()

    def mark_lost(self) -> None:
        """Record that the connection is lost."""
        self.closed = True

    def _flush(self) -> None:
        if self._before_flush:
            self._gather()
        self._flushing = False
        if self._before_flush:  # added by a function that was just called
            self._schedule_flush()
        out, self._unsent = self._unsent, []
        if not out:
            return
        data = b"".join(out)
        heads = frames.HEAD_BYTES * (len(out) - self._control_writes)
        self.payload_bytes += len(data) - self._control_bytes - heads
        self._control_bytes = self._control_writes = 0
        if self._transport.is_closing():
            return
        self._transport.write(data)
        if self._on_unread is not None and self._transport.get_write_buffer_size() > self._max_unsent_bytes:
            self._on_unread()

    def _gather(self) -> None:
        """Call the functions of `call_before_flush`, which may queue more bytes."""
        functions, self._before_flush = self._before_flush, []
        for function in functions:
            try:
                function()
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # the other bytes of the connection are sent all the same
                message = "a function that gathers bytes for a connection failed"
                self._loop.call_exception_handler({"message": message, "exception": error})


class BlockedAnswers:
    """The answers of one connection that wait until the client enlarges a flow-control window or reads more."""

    __slots__ = ("_by_connection", "_by_reader", "_by_stream", "_h2")

    def __init__(self, h2: ServerState) -> None:
        self._h2 = h2
        self._by_connection: dict[int, Callable[[], None]] = {}
        """Answers that wait for the connection's window, in the order in which they will be pushed."""
        self._by_stream: dict[int, Callable[[], None]] = {}
        self._by_reader: dict[int, Callable[[], None]] = {}
        """Answers that wait until the socket takes more bytes."""

    def add_unread(self, stream_id: int, push: Callable[[], None]) -> None:
        """Add an answer that waits until the client has read what was sent before. `push`: function that sends more of
        the answer."""
        self._by_reader[stream_id] = push

    def add(self, stream_id: int, push: Callable[[], None], *, of_stream: bool) -> None:
        """Add an answer that waits until a flow-control window grows. `push`: function that sends more of the answer.
        `of_stream`: whether the answer waits for its stream's window; otherwise it waits for the connection's
        window."""
        (self._by_stream if of_stream else self._by_connection)[stream_id] = push

    def discard(self, stream_id: int) -> None:
        """Remove the answer of a stream that has ended."""
        for waiting in (self._by_connection, self._by_stream, self._by_reader):
            waiting.pop(stream_id, None)

    def clear(self) -> None:
        """Remove all answers after the connection was lost."""
        for waiting in (self._by_connection, self._by_stream, self._by_reader):
            waiting.clear()

    def push_stream(self, stream_id: int) -> None:
        """Send more of the answer that waits for the window of this stream."""
        push = self._by_stream.pop(stream_id, None)
        if push is not None:
            push()

    def push(self) -> None:
        """Send more of the waiting answers while the connection's window is open. Each answer sends at least one byte,
        or begins to wait for the window of its stream."""
        blocked = self._by_connection
        while blocked and self._h2.outbound_flow_control_window > 0:
            blocked.pop(next(iter(blocked)))()

    def push_unread(self) -> None:
        """Send more of the answers that wait until the client reads."""
        waiting, self._by_reader = self._by_reader, {}
        for push in waiting.values():
            push()

    def push_all(self) -> None:
        """Continue to send all waiting answers, because the client has changed the size of the streams' windows."""
        blocked, self._by_stream = self._by_stream, {}
        for push in blocked.values():
            push()
        self.push()


class ReceiveWindows:
    """The receive windows of one connection and of its streams. Until the first call is admitted, the connection's
    window has HTTP/2's default size."""

    __slots__ = ("_growth", "_h2", "_output", "_step_bytes", "admitted")

    def __init__(self, h2: ServerState, output: ConnectionOutput) -> None:
        self._h2 = h2
        self._output = output
        self._growth = 0
        """Bytes by which the connection's window is to grow."""
        self._step_bytes = 0
        self.admitted = False
        """Whether a call of the connection was admitted, or the server needs no credential."""

    def admit(self, size: int) -> None:
        """Enlarge the connection's window to `size` bytes, because the first call was admitted."""
        self.admitted = True
        self._step_bytes = size // 4
        if size > FIRST_WINDOW_BYTES:
            self._h2.increment_flow_control_window(size - FIRST_WINDOW_BYTES)

    def grow(self, size: int, stream_id: int | None = None) -> None:
        """Let the client send `size` more bytes on a stream, or on the connection if `stream_id` is None."""
        if self._output.closed:
            return
        if stream_id is None:
            self._growth += size
            if self._growth < self._step_bytes:
                return
            size, self._growth = self._growth, 0
        with suppress(H2Error, KeyError):  # the stream may have ended
            self._h2.increment_flow_control_window(size, stream_id)
        self._output.write_h2()


class ConnectionCore:
    """The parts of one connection that its calls share: transport, h2's state, output, windows, limits and slot."""

    def __init__(
        self,
        transport: asyncio.Transport,
        slot: ConnectionSlot,
        limits: ServerLimits,
        budget: Budget | None,
        on_unread: Callable[[], None],
    ) -> None:
        """`on_unread`: called when more unsent bytes wait for the client than the client may leave unread."""
        self.transport = transport
        self.slot = slot
        self.limits = limits
        self.budget = budget
        self.loop = asyncio.get_running_loop()
        self.peer = _peer(transport.get_extra_info("peername"))
        self.h2 = ServerState(EndedStreams(UNAUTHENTICATED_RESETS_NOTED))
        self.output = ConnectionOutput(transport, self.h2, on_unread)
        self.blocked = BlockedAnswers(self.h2)
        self.windows = ReceiveWindows(self.h2, self.output)

    def mark_authenticated(self) -> None:
        """Mark the client as authenticated."""
        self.slot.mark_authenticated()


def _peer(name: Any) -> str:
    if not isinstance(name, tuple):
        return "unix:"
    return f"ipv6:[{name[0]}]:{name[1]}" if ":" in str(name[0]) else f"ipv4:{name[0]}:{name[1]}"
