"""A connection from one client, assembled from its parts: output, calls, limits, timeouts, lifetime."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple, cast

from h2 import events
from h2.settings import SettingCodes
from hyperframe.frame import Frame, SettingsFrame

from cluster.http2.call import CallTable, OpenStreams, ServerCall
from cluster.http2.connection_table import ConnectionSlot, ConnectionStage
from cluster.http2.frame_intake import FrameIntake
from cluster.http2.frames import FrameReader
from cluster.http2.lifetime import ConnectionLifetime, ConnectionLog
from cluster.http2.limits import Budget, Charges, ServerLimits
from cluster.http2.messages import RequestHead
from cluster.http2.output import ConnectionCore
from cluster.http2.read_slices import ReadTurns
from cluster.http2.timeouts import ConnectionTimeouts

_HTTP1 = (b"GET ", b"POST", b"PUT ", b"HEAD", b"OPTI", b"DELE", b"CONN", b"PATC")
_HTTP1_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n"
    b"this port speaks gRPC (HTTP/2); OpenAI's HTTP API is on the gateway's http port\n"
)
UNAUTHENTICATED_FRAME_BYTES: Final = 16_384
"""Maximum frame size in bytes before a call was admitted. HTTP/2 allows no lower maximum."""
# Read buffer that all connections share; its size is the most that one connection reads in one pass. asyncio's own
# reads of 256 KiB, handled by h2, blocked the event loop for 20 ms when many long prompts came at once.
_READ = memoryview(bytearray(65_536))
_UNAUTHENTICATED_READ = _READ[:UNAUTHENTICATED_FRAME_BYTES]


class ServerParts(NamedTuple):
    """The parts of a server that its connections use. `gated`: whether the server's calls need a credential."""

    limits: ServerLimits
    budget: Budget | None
    gated: bool
    turns: ReadTurns
    log: ConnectionLog
    connections: set[Connection]
    start_call: Callable[[ServerCall, RequestHead], None]
    """Starts a call whose head has arrived, or refuses the call."""
    on_call_end: Callable[[], None]


class Connection:
    """A connection from one client: its parts, its settings, and its slot in the port's connection table."""

    def __init__(self, transport: asyncio.Transport, server: ServerParts, age_s: float, slot: ConnectionSlot) -> None:
        """`age_s`: age limit in seconds, 0 for none. `slot`: the connection's slot in the port's pool."""
        self.transport = transport
        self._slot = slot
        limits, self._gated = server.limits, server.gated
        max_calls = min(limits.unauthenticated_calls, limits.max_calls) if self._gated else limits.max_calls
        self.core = core = ConnectionCore(
            transport,
            slot,
            limits,
            server.budget,
            lambda: self.lifetime.abort("the client does not read what it is sent"),
        )
        self._charges = Charges(limits, core.output, core.loop.time())
        self._reader = FrameReader(UNAUTHENTICATED_FRAME_BYTES, limits.max_header_bytes)
        self._table = CallTable(limits, max_calls)
        note = partial(server.log.note, core.peer)
        self.lifetime = ConnectionLifetime(core, self._reader, self._table.by_stream, note)
        self.calls = OpenStreams(
            core, self._table, self.lifetime, self._charges, server.start_call, self._raise_limits, server.on_call_end
        )
        self.intake = FrameIntake(
            core, self._reader, self._charges, self.calls, self.lifetime, server.turns, self._handle
        )
        self._send_settings(max_calls)
        self.timeouts = ConnectionTimeouts(core, self.lifetime, self.intake, self.calls, age_s)

    def _send_settings(self, max_calls: int) -> None:
        limits, h2 = self.core.limits, self.core.h2
        h2.local_settings = type(h2.local_settings)(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: max_calls,
                SettingCodes.MAX_HEADER_LIST_SIZE: limits.max_header_bytes,
                SettingCodes.INITIAL_WINDOW_SIZE: limits.window_bytes,
                SettingCodes.MAX_FRAME_SIZE: UNAUTHENTICATED_FRAME_BYTES if self._gated else limits.frame_bytes,
            },
        )
        h2.decoder.max_header_list_size = limits.max_header_bytes
        h2.initiate_connection()
        if not self._gated:
            self._raise_limits()
        self.core.output.write_h2()

    def _raise_limits(self) -> None:
        """Raise the limits of the connection to those of an authenticated connection."""
        limits, h2 = self.core.limits, self.core.h2
        self._table.admit()
        self._charges.admit(self.core.loop.time())
        self._reader.allow_frames(limits.frame_bytes)
        self.core.output.allow_unsent(limits.max_unsent_bytes)
        h2.note_resets(limits.max_calls)
        if self._gated:
            h2.update_settings(
                {
                    SettingCodes.MAX_CONCURRENT_STREAMS: limits.max_calls,
                    SettingCodes.MAX_FRAME_SIZE: limits.frame_bytes,
                }
            )
        self.core.windows.admit(limits.connection_window_bytes)
        self.core.output.write_h2()

    def _handle(self, frame: Frame) -> None:
        """Handle a frame that was already charged. Raises H2Error."""
        received = self.core.h2.receive_frame(frame)
        if type(frame) is SettingsFrame:
            # New settings apply at once, so their acknowledgement is sent first. Without the acknowledgement, a client
            # treats a larger frame, or more data than the old window allows, as an error and resets the stream.
            self.core.output.write_h2()
        calls, output, blocked = self.calls, self.core.output, self.core.blocked
        for event in received:
            if output.closed:
                return
            match event:
                case events.DataReceived():
                    calls.received(event)
                case events.RequestReceived():
                    calls.open(event)
                case events.StreamEnded():
                    calls.half_close(event)
                case events.StreamReset():
                    calls.close(event)
                case events.WindowUpdated(stream_id=stream_id):
                    if stream_id:
                        blocked.push_stream(stream_id)
                    else:
                        blocked.push()
                case events.RemoteSettingsChanged(changed_settings=changed):
                    self.timeouts.greet()
                    if SettingCodes.HEADER_TABLE_SIZE in changed:
                        output.reset_table()
                    blocked.push_all()
                case events.PingAckReceived():
                    self.timeouts.answered()
                case events.ConnectionTerminated():
                    self.lifetime.follow_goaway()

    def pause(self) -> None:
        """Make the writers of all calls wait, because the client does not read."""
        self.core.output.pause(True)
        for call in self.calls.by_stream.values():
            call.update_full()

    def resume(self) -> None:
        """Send more of the waiting answers and wake the writers of all calls, because the client reads again."""
        self.core.output.pause(False)
        self.core.blocked.push_unread()
        for call in list(self.calls.by_stream.values()):
            call.wake_writers()

    def lose(self) -> None:
        """Close all calls after the connection was lost."""
        self._slot.release()
        self.lifetime.end()
        self.calls.close_all()

    @property
    def stage(self) -> ConnectionStage:
        """The progress of the connection, by which the connection table chooses the connection to close."""
        if self.calls.by_stream:
            return ConnectionStage.CALLING
        return ConnectionStage.GREETED if self.timeouts.greeted else ConnectionStage.SILENT

    @property
    def requests(self) -> int:
        """The stream id of the newest call, which grows with every call that begins on the connection."""
        return self.core.h2.highest_inbound_stream_id

    def evict(self) -> None:
        """Close the connection, because another connection takes its slot."""
        if self._slot.authenticated:
            self.lifetime.refuse_new_calls()
            self.lifetime.close()
        if not self._slot.authenticated or self.transport.get_write_buffer_size():
            self.transport.abort()


class ConnectionProtocol(asyncio.BufferedProtocol):
    """asyncio's callbacks for one connection. The connection begins when the transport is connected."""

    _connection: Connection
    _core: ConnectionCore
    _intake: FrameIntake

    def __init__(self, server: ServerParts, age_s: float, slot: ConnectionSlot) -> None:
        self._server = server
        self._age_s = age_s
        self._slot = slot

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Create the Connection for a new transport and put it into this protocol's slot. If the slot was released
        before the transport was ready, abort the transport."""
        connection = Connection(cast(asyncio.Transport, transport), self._server, self._age_s, self._slot)
        self._connection = self._slot.connection = connection
        self._core, self._intake = connection.core, connection.intake
        self._server.connections.add(connection)
        if self._slot.released:
            connection.transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the buffer to read into."""
        return _READ if self._core.windows.admitted else _UNAUTHENTICATED_READ

    def buffer_updated(self, nbytes: int) -> None:
        """Handle bytes received from the client."""
        output = self._core.output
        if output.closed:
            return
        if not self._connection.timeouts.greeted and bytes(_READ[:4]) in _HTTP1:
            output.close_with(_HTTP1_ANSWER)
            return
        self._intake.feed(_READ[:nbytes])

    def connection_lost(self, error: Exception | None) -> None:
        """Close all calls after the connection was lost."""
        self._server.connections.discard(self._connection)
        self._connection.lose()

    def pause_writing(self) -> None:
        """Stop writing while the client does not read."""
        self._connection.pause()

    def resume_writing(self) -> None:
        """Resume writing when the client reads again."""
        self._connection.resume()
