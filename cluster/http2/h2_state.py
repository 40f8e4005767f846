"""State of the library h2 for one connection. This server replaces some parts of it. Only this module uses h2's private
names.

DATA and WINDOW_UPDATE frames arrive or leave with every token. A usual frame of these two types is handled without h2,
in a fifth of the time; h2 handles the unusual ones.

For each new stream, h2 counts the open streams by walking all of them. h2 also keeps a note of each of the last 65,536
ended streams, which takes 10 MB. In this server the connection counts its calls itself, and a stream is dropped when
the stream's call ends.
"""

from __future__ import annotations

from collections import OrderedDict

from h2 import events
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from h2.stream import H2Stream, StreamClosedBy, StreamInputs, StreamState
from hyperframe.frame import Frame

from cluster.http2.header_decoder import HeaderDecoder

# Header validation is off: this server reads only the headers that a call needs, and forwards no headers.
_CONFIGURATION = H2Configuration(
    client_side=False, header_encoding=None, validate_inbound_headers=False, normalize_inbound_headers=False
)
_PRIVATE = (
    "_closed_streams",
    "_data_to_send",
    "_inbound_flow_control_window_manager",
    "_receive_frame",
    "_terminate_connection",
)
_PRIVATE_OF_STREAM = ("_actual_content_length", "_expected_content_length", "_inbound_window_manager")
MAX_WINDOW = 2**31 - 1
_OPEN = (StreamState.OPEN, StreamState.HALF_CLOSED_LOCAL)
_RESETS = (StreamClosedBy.SEND_RST_STREAM, StreamClosedBy.RECV_RST_STREAM)


class EndedStreams(OrderedDict[int, StreamClosedBy | None]):
    """A replacement for h2's notes of ended streams. It keeps notes only of the last `most` streams that were reset.

    h2 reads a stream's note when a frame arrives after the stream's end. Notes of streams that ended normally are not
    needed: they only decide with which error h2 ends the connection.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __setitem__(self, stream_id: int, by: StreamClosedBy | None) -> None:
        if by not in _RESETS:
            return
        super().__setitem__(stream_id, by)
        while len(self) > self.most:
            self.popitem(last=False)


class Http2State(H2Connection):
    """The h2 state of a connection, in a server or in a client."""

    def output(self) -> bytes:
        """Return the bytes to send, like h2's data_to_send, but at less cost if there are no bytes."""
        return self.data_to_send() if self._data_to_send else b""


class ServerState(Http2State):
    """The h2 state of a server connection, which receives one frame at a time."""

    def __init__(self, ended: EndedStreams) -> None:
        """`ended`: the record of streams that were reset. It takes the place of h2's own record."""
        super().__init__(_CONFIGURATION)
        self.decoder = HeaderDecoder()
        self._ended = ended
        self._closed_streams = ended

    def note_resets(self, most: int) -> None:
        """Set the maximum number of reset streams that are remembered."""
        self._ended.most = most

    @property
    def open_inbound_streams(self) -> int:
        """Always zero, so that h2 never refuses a stream: CallTable limits the number of calls."""
        return 0

    def receive_frame(self, frame: Frame) -> list[events.Event]:
        """Handle one frame and return its events. Raises ProtocolError, after which only h2's GOAWAY may be sent."""
        try:
            return self._receive_frame(frame)
        except ProtocolError as error:
            self._terminate_connection(error.error_code)
            raise

    def receive_data_of(self, stream: H2Stream, size: int, *, ends: bool) -> bool:
        """Update the state for a DATA frame of `size` bytes, with the same effect as receive_frame. `ends`: whether the
        frame has the flag END_STREAM; the frame must have no other flag.

        Returns False and changes nothing if receive_frame must handle the frame.
        """
        own, whole = stream._inbound_window_manager, self._inbound_flow_control_window_manager
        least = min(own.current_window_size, whole.current_window_size)
        if size > least or stream.state_machine.state not in _OPEN:
            return False
        if ends:
            if stream._expected_content_length is not None:
                return False
            stream.state_machine.process_input(StreamInputs.RECV_END_STREAM)
        own.current_window_size -= size
        whole.current_window_size -= size
        stream._actual_content_length += size
        return True

    def receive_window_of(self, holder: H2Stream | ServerState, size: int) -> bool:
        """Apply a WINDOW_UPDATE of `size` bytes to the send window of `holder`, a stream or the connection. Returns
        False and changes nothing if the size is invalid; receive_frame must then handle the frame."""
        window = holder.outbound_flow_control_window + size
        if not size or window > MAX_WINDOW:
            return False
        holder.outbound_flow_control_window = window
        return True

    def refuse(self, error_code: ErrorCodes) -> None:
        """Prepare a GOAWAY with this error code, because the received bytes are not a valid frame."""
        self._terminate_connection(error_code)

    def drop_closed(self, stream_id: int) -> None:
        """Drop a stream from h2's state if the stream has ended."""
        stream = self.streams.get(stream_id)
        if stream is not None and stream.closed:
            del self.streams[stream_id]
            self._closed_streams[stream_id] = stream.closed_by


def check_private_names() -> None:
    """Raise RuntimeError, with the remedy, if the installed h2 lacks a private name that this module uses."""
    connection = H2Connection(_CONFIGURATION)
    stream = H2Stream(1, _CONFIGURATION, 1, 1)
    missing = [f"H2Connection.{name}" for name in (*_PRIVATE, "streams") if not hasattr(connection, name)]
    missing += [f"H2Stream.{name}" for name in _PRIVATE_OF_STREAM if not hasattr(stream, name)]
    if missing:
        names = ", ".join(missing)
        raise RuntimeError(f"the installed h2 has no {names}: install the version that requirements/ names")


check_private_names()
