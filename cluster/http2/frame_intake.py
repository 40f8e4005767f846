"""Parsing of a client's bytes into frames, in short slices of time. Between two slices, other connections are
handled.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

from h2.exceptions import H2Error, ProtocolError
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, SettingsFrame

from cluster.http2.call import OpenStreams
from cluster.http2.frames import DATA, WINDOW_UPDATE, FrameReader
from cluster.http2.lifetime import ConnectionLifetime
from cluster.http2.limits import STREAMS_PER_UNIT, Charges
from cluster.http2.messages import BadMessage
from cluster.http2.output import ConnectionCore
from cluster.http2.read_slices import ReadTurns

LARGE_BYTES: Final = 16_384
"""Size in bytes from which a read is queued and not parsed at once (read_slices.py)."""
MAX_QUEUED_BYTES: Final = 16_384
"""Number of queued bytes at which reading from the client pauses."""
SMALL_DATA_BYTES: Final = 64
"""Size in bytes below which a DATA frame is charged as an empty frame."""
WINDOW_UPDATE_BYTES: Final = 4
GOAWAY_UNITS: Final = 5.0
"""Cost of a GOAWAY frame, in units (limits.py). A correct client sends at most two GOAWAY frames."""


class FrameIntake:
    """The received bytes of one connection that are not parsed into frames yet. Implements read_slices.Reader."""

    def __init__(
        self,
        core: ConnectionCore,
        reader: FrameReader,
        charges: Charges,
        calls: OpenStreams,
        lifetime: ConnectionLifetime,
        turns: ReadTurns,
        handle: Callable[[Frame], None],
    ) -> None:
        """`handle`: function that handles a frame after the frame was charged; it may raise H2Error."""
        self._transport = core.transport
        self._h2 = core.h2
        self._output = core.output
        self._blocked = core.blocked
        self._loop = core.loop
        self._calls = calls
        self._by_stream = calls.by_stream
        self._lifetime = lifetime
        self._handle_charged = handle
        self._reader = reader
        self._charges = charges
        self._turns = turns
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
        try:
            more = self._handle(until)
        except BaseException:  # as asyncio's transport does when a protocol raises
            self._transport.abort()
            raise
        delayed = self._charges.delayed
        self._queued = more or delayed
        if self._output.closed:
            self._reader.clear()
            return False
        if delayed:
            self._pause()
            self._lifetime.call_later(self._charges.delay_s(), self._after_delay)
            return False
        if not more and self._paused:
            self._paused = False
            self._transport.resume_reading()
        return more

    def stalled_s(self, now: float) -> float:
        """Seconds since an incomplete frame or header block last made progress; 0 while frames are queued."""
        return 0.0 if self._queued else max(now - self._unfinished_since, 0.0)

    def _after_delay(self) -> None:
        self._charges.charge_fields(0, self._loop.time())
        self._turns.put(self)

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def _handle(self, until: float) -> bool:
        output, reader, handled, more = self._output, self._reader, False, False
        try:
            while not output.closed and self._peek():
                if more:
                    break
                handled = True
                if not (reader.plain and self._handle_fast()):
                    self._handle_any()
                more = time.perf_counter() >= until or self._charges.delayed
            else:
                more = False
        except H2Error as error:
            self._lifetime.refuse(str(error) or type(error).__name__)
            return False
        output.write_h2()
        if not reader.unfinished:
            self._unfinished_since = math.inf
        elif handled or self._unfinished_since == math.inf:
            self._unfinished_since = self._loop.time()
        return more and not output.closed

    def _peek(self) -> bool:
        try:
            return self._reader.peek()
        except ProtocolError as error:
            self._h2.refuse(error.error_code)
            raise

    def _handle_fast(self) -> bool:
        """Handle a DATA or WINDOW_UPDATE frame without h2. Returns False if h2 must handle the frame."""
        reader = self._reader
        if reader.kind == DATA:
            call = self._by_stream.get(reader.stream_id)
            if call is None or (reader.length < SMALL_DATA_BYTES and not self._charges.justify_frame()):
                return False
            if not self._h2.receive_data_of(call.stream, reader.length, ends=reader.ends):
                return False
            ends = reader.ends
            try:
                call.request.received(reader.body(), reader.length)
            except BadMessage as error:
                self._calls.end_early(call, error)
            if ends:
                call.request.end()
            return True
        if reader.kind != WINDOW_UPDATE or reader.length != WINDOW_UPDATE_BYTES:
            return False
        return self._window_update()

    def _window_update(self) -> bool:
        h2, reader, stream_id, call = self._h2, self._reader, self._reader.stream_id, None
        if stream_id:
            call = self._by_stream.get(stream_id)
            if call is None or call.closed:
                return False
        if not self._charges.justify_frame():
            return False
        size = reader.increment
        if not h2.receive_window_of(h2 if call is None else call.stream, size):
            return False
        reader.body()
        if stream_id:
            self._blocked.push_stream(stream_id)
        else:
            self._blocked.push()
        return True

    def _handle_any(self) -> None:
        """Handle a frame of any kind. Raises H2Error."""
        try:
            frame = self._reader.frame()
        except ProtocolError as error:
            self._h2.refuse(error.error_code)
            raise
        if frame is None:
            return
        if self._may_send(frame):
            self._handle_charged(frame)
        else:
            self._lifetime.cut("too many resets, refused calls or empty frames")

    def _may_send(self, frame: Frame) -> bool:
        """Charge a frame to the client. Returns False if the client exceeds its limit with this frame.

        A refused or reset call is charged at the refusal or reset, not here.
        """
        charges, streams, now = self._charges, self._h2.streams, self._loop.time()
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
