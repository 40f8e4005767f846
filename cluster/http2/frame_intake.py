"""Parsing of a client's bytes into frames, which are charged. Other connections are handled between two slices of
parsing."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Final, Protocol

from h2.exceptions import H2Error, ProtocolError
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, SettingsFrame

from cluster.http2.call import ServerCall
from cluster.http2.frame_costs import STREAMS_PER_UNIT, Charges
from cluster.http2.frame_reader import DATA, WINDOW_UPDATE, FrameReader
from cluster.http2.h2_state import Http2State
from cluster.http2.read_slices import ReadTurns

LARGE_BYTES: Final = 16_384
"""Size in bytes from which a read is queued and not parsed at once (read_slices.py)."""
MAX_QUEUED_BYTES: Final = 16_384
"""Number of queued bytes at which reading from the client pauses."""
SMALL_DATA_BYTES: Final = 64
"""Size in bytes below which a DATA frame is charged as an empty frame."""
WINDOW_UPDATE_BYTES: Final = 4
GOAWAY_UNITS: Final = 5.0
"""Cost of a GOAWAY frame, in units. A client sends one or two GOAWAY frames."""


class IntakeConnection(Protocol):
    """The part of a connection that the frame intake uses."""

    loop: asyncio.AbstractEventLoop
    h2: Http2State
    transport: asyncio.Transport
    calls: dict[int, ServerCall]
    closing: bool

    def handle(self, frame: Frame) -> None:
        """Handle a frame that was already charged. Raises H2Error."""

    def data(self, call: ServerCall, data: bytes, size: int) -> None:
        """Pass received request bytes to a call. `size`: number of bytes including padding."""

    def window_opened(self, stream_id: int | None) -> None:
        """Push the calls that waited for the send window of a stream, or of the connection if `stream_id` is 0 or
        None."""

    def send_h2_output(self) -> None:
        """Append h2's pending output to the buffer that is sent at the end of this event-loop pass."""

    def refuse(self, reason: str) -> None:
        """Close the connection, which violated HTTP/2. h2 has already prepared the GOAWAY."""

    def cut(self, reason: str) -> None:
        """Close the connection with the error ENHANCE_YOUR_CALM, because the client exceeded a limit."""

    def call_later(self, seconds: float, work: Callable[..., None]) -> None:
        """Call `work` after `seconds`, unless the connection is lost before then."""


class FrameIntake:
    """The received frames of one connection that are not parsed yet. Implements read_slices.Reader."""

    def __init__(self, connection: IntakeConnection, reader: FrameReader, charges: Charges, turns: ReadTurns) -> None:
        self._connection = connection
        self._reader = reader
        self._charges = charges
        self._turns = turns
        self._loop = connection.loop
        self._queued = self._paused = False
        self._unfinished_since = math.inf

    def feed(self, data: memoryview) -> None:
        """Add bytes received from the client."""
        self._reader.feed(data)
        if self._queued:
            if self._reader.size >= MAX_QUEUED_BYTES:
                self._pause()
        elif len(data) >= LARGE_BYTES or self._turns.parse_now(self):
            self._queued = True
            if len(data) >= LARGE_BYTES:
                self._pause()
            self._turns.put(self)

    def parse(self, until: float) -> bool:
        """Handle frames until the clock reaches `until`. Returns whether frames are left."""
        connection = self._connection
        try:
            more = self._handle(until)
        except BaseException:  # as asyncio's transport does when a protocol raises
            connection.transport.abort()
            raise
        delayed = self._charges.delayed
        self._queued = more or delayed
        if connection.closing:
            self._reader.clear()
            return False
        if delayed:
            self._pause()
            connection.call_later(self._charges.delay_s(), self._after_delay)
            return False
        if not more and self._paused:
            self._paused = False
            connection.transport.resume_reading()
        return more

    def allow_frames(self, size: int) -> None:
        """Set the maximum frame size in bytes."""
        self._reader.max_frame_bytes = size

    def clear(self) -> None:
        """Drop the unparsed bytes."""
        self._reader.clear()

    def stalled_s(self, now: float) -> float:
        """Seconds since an incomplete frame or header block last made progress; 0 while frames are queued."""
        return 0.0 if self._queued else max(now - self._unfinished_since, 0.0)

    def _after_delay(self) -> None:
        self._charges.charge_fields(0, self._loop.time())
        self._turns.put(self)

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            self._connection.transport.pause_reading()

    def _handle(self, until: float) -> bool:
        connection, reader, handled, more = self._connection, self._reader, False, False
        try:
            while not connection.closing and self._peek():
                if more:
                    break
                handled = True
                if not (reader.plain and self._handle_fast()):
                    self._handle_any()
                more = time.perf_counter() >= until or self._charges.delayed
            else:
                more = False
        except H2Error as error:
            connection.refuse(str(error) or type(error).__name__)
            return False
        connection.send_h2_output()
        if not reader.unfinished:
            self._unfinished_since = math.inf
        elif handled or self._unfinished_since == math.inf:
            self._unfinished_since = self._loop.time()
        return more and not connection.closing

    def _peek(self) -> bool:
        try:
            return self._reader.peek()
        except ProtocolError as error:
            self._connection.h2.refuse(error.error_code)
            raise

    def _handle_fast(self) -> bool:
        """Handle a DATA or WINDOW_UPDATE frame without h2. Returns False if h2 must handle the frame."""
        connection, reader = self._connection, self._reader
        if reader.kind == DATA:
            call = connection.calls.get(reader.stream_id)
            if call is None or (reader.length < SMALL_DATA_BYTES and not self._charges.justify_frame()):
                return False
            if not connection.h2.receive_data_of(call.stream, reader.length, ends=reader.ends):
                return False
            ends = reader.ends
            connection.data(call, reader.body(), reader.length)
            if ends:
                call.ended()
            return True
        if reader.kind != WINDOW_UPDATE or reader.length != WINDOW_UPDATE_BYTES:
            return False
        return self._window_update()

    def _window_update(self) -> bool:
        connection, reader, call = self._connection, self._reader, None
        if reader.stream_id:
            call = connection.calls.get(reader.stream_id)
            if call is None or call.closed:
                return False
        if not self._charges.justify_frame():
            return False
        size = reader.increment
        if not connection.h2.receive_window_of(connection.h2 if call is None else call.stream, size):
            return False
        reader.body()
        connection.window_opened(reader.stream_id)
        return True

    def _handle_any(self) -> None:
        """Handle a frame of any kind. Raises H2Error."""
        connection = self._connection
        try:
            frame = self._reader.frame()
        except ProtocolError as error:
            connection.h2.refuse(error.error_code)
            raise
        if frame is None:
            return
        if self._may_send(frame):
            connection.handle(frame)
        else:
            connection.cut("too many resets, refused calls or empty frames")

    def _may_send(self, frame: Frame) -> bool:
        """Charge a frame. Returns False if the frame exceeds the client's limit.

        Refused and reset calls are charged when the refusal or reset happens."""
        charges, streams, now = self._charges, self._connection.h2.streams, self._loop.time()
        if isinstance(frame, DataFrame):
            if frame.stream_id not in streams:
                return charges.charge(1, now)
            return len(frame.data) >= SMALL_DATA_BYTES or charges.charge_empty(now)
        if isinstance(frame, HeadersFrame):
            return frame.stream_id not in streams or charges.charge_empty(now)
        if isinstance(frame, SettingsFrame) and "ACK" not in frame.flags:
            return charges.charge(1 + len(streams) / STREAMS_PER_UNIT, now)
        if isinstance(frame, GoAwayFrame):  # one is enough, and each GOAWAY may have the maximum frame size
            return charges.charge(GOAWAY_UNITS, now)
        return charges.charge_empty(now)
