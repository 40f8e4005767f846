"""The answer to one call: headers, messages and status, sent as far as the client's flow-control windows allow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from h2.exceptions import H2Error
from h2.stream import StreamInputs

from cluster.http2 import frames
from cluster.http2.frames import DATA_HEAD, MESSAGE_HEAD
from cluster.http2.limits import UNREAD_STEP
from cluster.http2.messages import headers_of
from cluster.http2.output import ConnectionCore
from cluster.http2.request_body import RequestStream

if TYPE_CHECKING:
    from h2.stream import H2Stream

_OK_HEAD = b"\x88" + frames.literal(b"content-type", b"application/grpc")  # \x88: `:status: 200` in the static table
MOST_AT_ONCE: Final = 256 << 10
"""Number of bytes of an answer that are sent in one event-loop pass. So the socket's buffer holds little of answers
that the client does not read, however large its flow-control windows are."""
_ANONYMOUS_PATHS = ("/grpc.health.", "/grpc.reflection.")
"""Path prefixes of methods that need no credential. Their answers do not show that the client is authenticated."""


class ResponseWriter:
    """The answer to one call. `send` accepts a message at once, and buffers the bytes that the client's windows or the
    socket do not allow yet."""

    def __init__(
        self, core: ConnectionCore, stream: H2Stream, path: str, request: RequestStream, on_end: Callable[[int], None]
    ) -> None:
        """`on_end`: called with the stream id once the status was sent."""
        self.path = path
        self.stream = stream
        self.stream_id: int = stream.stream_id
        self.request = request
        self.connection = core
        self._on_end = on_end
        self._h2 = core.h2
        self._output = core.output
        self._id_bytes = self.stream_id.to_bytes(4, "big")
        self._head_sent = False
        self._end: bytes | None = None
        self._writers: list[asyncio.Future[None]] = []
        self._pending = bytearray()
        """Bytes of messages that the flow-control windows do not allow yet."""
        self._pushed_bytes = 0
        """Number of bytes that were pending and have been sent."""
        self._unread: tuple[int, float] | None = None
        """`_pushed_bytes` and the time at the last progress of a client that `unread_s` has found behind; else None."""
        self.closed = False
        """Whether no more bytes can be sent: the status was sent, the stream was reset, or the connection is lost."""
        self.full = core.output.paused
        """Whether the client must read before more may be sent. A plain attribute, since every token checks it."""
        self._sends_at_once = False
        """Whether a message is sent at once if the flow-control windows allow: the headers were sent, the answer is
        neither full nor closed."""

    def send(self, message: bytes) -> None:
        """Send one serialized message as soon as the flow-control windows allow. Does nothing if the call is closed."""
        size = len(message)
        frame = size + 5
        stream, h2 = self.stream, self._h2
        if (
            self._sends_at_once
            and frame < 2048
            and frame <= stream.outbound_flow_control_window
            and frame <= h2.outbound_flow_control_window
        ):
            # h2.send_data would do the same for an open stream, but takes 7 µs.
            stream.outbound_flow_control_window -= frame
            h2.outbound_flow_control_window -= frame
            self._output.write(DATA_HEAD[frame] + self._id_bytes + MESSAGE_HEAD[size] + message)
            return
        self.begin_message(size)
        self._pending += message
        self.push()

    def begin_message(self, size: int) -> None:
        """Queue the beginning of a message: the headers if they are not sent yet, and the size of the message."""
        if not self._head_sent:
            self.send_head()
        self._pending += b"\x00" + size.to_bytes(4, "big")

    def call_before_flush(self, function: Callable[[], None]) -> None:
        """Call a function, which may send messages, before the connection next sends bytes. This happens in the current
        or the next event-loop pass."""
        self._output.call_before_flush(function)

    async def wait_until_writable(self) -> None:
        """Wait until the answer is no longer full, or is closed."""
        while self.full and not self.closed:
            waiter = asyncio.get_running_loop().create_future()
            self._writers.append(waiter)
            await waiter

    def push(self) -> None:
        """Send pending bytes as far as the flow-control windows and the socket allow. After the last pending byte, send
        the status."""
        pending, stream, h2 = self._pending, self.stream, self._h2
        if self.closed:
            pending.clear()
        until = len(pending) - MOST_AT_ONCE
        while pending:
            if self._output.paused or len(pending) <= until:
                self.update_full()
                self.connection.blocked.add_unread(self.stream_id, self.push)
                if not self._output.paused:  # the next pass knows whether the socket has taken all
                    self._output.call_before_flush(self.connection.blocked.push_unread)
                return
            size = min(
                len(pending), stream.outbound_flow_control_window, h2.outbound_flow_control_window,
                h2.max_outbound_frame_size,
            )  # fmt: skip
            if size <= 0:
                self.update_full()
                self.connection.blocked.add(
                    self.stream_id, self.push, of_stream=stream.outbound_flow_control_window <= 0
                )
                return
            stream.outbound_flow_control_window -= size
            h2.outbound_flow_control_window -= size
            self._output.write(frames.data_frame(self._id_bytes, bytes(pending[:size])))
            del pending[:size]
            self._pushed_bytes += size
        if self._end is not None:
            self._send_end(self._end)
        self.wake_writers()

    @property
    def pending_bytes(self) -> int:
        """Number of bytes that wait for the client, which has not read enough yet."""
        return len(self._pending)

    def unread_s(self, now: float) -> float:
        """Return for how long the client has not made progress in reading this answer, in seconds; 0 while nothing is
        pending. `now`: loop time. The time is measured from the first call that finds pending bytes."""
        if not self._pending:
            self._unread = None
        elif self._unread is None or self._pushed_bytes - self._unread[0] >= UNREAD_STEP:
            self._unread = (self._pushed_bytes, now)
        return now - self._unread[1] if self._unread is not None else 0.0

    def update_full(self) -> None:
        """Recompute `full`, after the pending bytes have changed or the client has stopped or resumed reading."""
        self.full = self._output.paused or len(self._pending) > 0
        self._sends_at_once = self._head_sent and not self.full and not self.closed

    def wake_writers(self) -> None:
        """Recompute `full`, and wake waiting writers if the answer is no longer full, or is closed."""
        self.update_full()
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
        """Send the response headers if they are not sent yet."""
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
        """Answer a request that is not a gRPC call with an HTTP status."""
        self._send_headers(frames.literal(b":status", http_status), end=True)

    def _send_end(self, end: bytes) -> None:
        if self.closed:
            return
        self._send_headers(end if self._head_sent else _OK_HEAD + end, end=True)
        self.closed = True
        self.update_full()  # now, since `on_end` may close the connection, which first gathers what others want to send
        self._on_end(self.stream_id)

    def _send_headers(self, fields: bytes, end: bool) -> None:
        machine = self.stream.state_machine
        try:
            machine.process_input(StreamInputs.SEND_HEADERS)
            if end:
                machine.process_input(StreamInputs.SEND_END_STREAM)
        except H2Error:  # the received bytes that opened the stream also reset the stream
            self.closed, self._sends_at_once = True, False
            return
        self._output.write_headers(self._id_bytes, fields, end)
        if end and not self.request.half_closed:  # the reset stops a client that is still sending
            self._output.reset_stream(self.stream_id)
