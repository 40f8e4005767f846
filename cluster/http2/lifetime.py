"""The end of a connection. Normally the client is asked to reconnect, running calls finish, and the connection is
closed. If the client has violated the protocol or exceeded a limit, the connection is closed at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final

import structlog
from h2.connection import ConnectionState
from h2.errors import ErrorCodes
from h2.exceptions import H2Error

from cluster.http2.frames import MAX_STREAM_ID, FrameReader
from cluster.http2.output import ConnectionCore

log = structlog.get_logger("rpc")

CLOSE_S: Final = 5.0
"""Time in seconds after which a closed connection is aborted if the client reads nothing."""
NOTE_S: Final = 1.0
"""Minimum interval in seconds between two log lines about one kind of event, for all connections together."""


class ConnectionLog:
    """A log of connections that the server closes, with at most one line a second for each kind of event."""

    def __init__(self) -> None:
        self._noted: dict[str, tuple[float, int]] = {}

    def note(self, peer: str, event: str, reason: str) -> None:
        """Log an event of a connection. If the last line about the same kind of event is younger than NOTE_S seconds,
        only count the event."""
        now = asyncio.get_running_loop().time()
        at, more = self._noted.get(event, (-NOTE_S, 0))
        if now - at < NOTE_S:
            self._noted[event] = (at, more + 1)
            return
        self._noted[event] = (now, 0)
        log.warning(event, peer=peer, reason=reason, not_logged_before=more)


class ConnectionLifetime:
    """The steps in which one connection ends, and the connection's timers. A step is never undone."""

    def __init__(
        self, core: ConnectionCore, reader: FrameReader, calls: Mapping[int, object], note: Callable[[str, str], None]
    ) -> None:
        """`reader`: the received bytes, which are dropped when the connection is closed. `calls`: the open calls by
        stream id. `note`: logs an event of this connection with a reason."""
        self._transport = core.transport
        self._h2 = core.h2
        self._output = core.output
        self._reader = reader
        self._calls = calls
        self._note = note
        self._loop = core.loop
        self._timers: list[asyncio.TimerHandle] = []
        self._leaving = self._refusing = False
        self._last_accepted = MAX_STREAM_ID

    def call_later(self, seconds: float, work: Callable[..., None], *arguments: object) -> None:
        """Call `work` after `seconds`, unless the connection is lost before then."""
        now = self._loop.time()
        self._timers = [t for t in self._timers if t.when() > now and not t.cancelled()]
        self._timers.append(self._loop.call_later(seconds, work, *arguments))

    def end(self) -> None:
        """Cancel all timers and drop the unread bytes, after the connection was lost."""
        self._output.mark_lost()
        self._reader.clear()
        for timer in self._timers:
            timer.cancel()

    def accepts(self, stream_id: int) -> bool:
        """Whether the client may begin a call with this stream id."""
        return stream_id <= self._last_accepted

    def leave(self) -> None:
        """Ask the client to reconnect. This connection is closed after its last call."""
        if self._leaving:
            return
        self._leaving = True
        self._output.write_goaway(MAX_STREAM_ID)  # calls that were sent already are still accepted (RFC 9113, 6.8)
        self.call_later(1.0, self.refuse_new_calls)

    def refuse_new_calls(self) -> None:
        """Accept no further call, and send the client the id of the last accepted stream."""
        if self._refusing or self._transport.is_closing():
            return
        self._refusing = True
        self._last_accepted = self._h2.highest_inbound_stream_id
        self._output.write_goaway(self._last_accepted)
        self.close_if_done()

    def follow_goaway(self) -> None:
        """Accept no further call after the client's GOAWAY, and let running calls finish as HTTP/2 requires. h2 alone
        would end the running calls too."""
        if not self._calls:
            self.close()
            return
        self._h2.state_machine.state = ConnectionState.SERVER_OPEN
        self._leaving = self._refusing = True
        self._last_accepted = max(self._calls)

    def close_if_done(self) -> None:
        """Close the connection if no call is open and no further call is accepted."""
        if self._refusing and not self._calls:
            self.close()

    def close(self) -> None:
        """Flush and close the connection. Bytes received from now on are ignored."""
        self._reader.clear()
        closing = self._transport.is_closing()
        self._output.close()
        if not closing:
            self.call_later(CLOSE_S, self._expect_closed, self._transport.get_write_buffer_size())

    def refuse(self, reason: str) -> None:
        """Close the connection, because the client violated HTTP/2. h2 has already prepared the GOAWAY."""
        self._note("connection.protocol_violated", reason)
        self.close()

    def cut(self, reason: str) -> None:
        """Close the connection with the error ENHANCE_YOUR_CALM, because the client exceeded a limit."""
        self._note("connection.cut", reason)
        with suppress(H2Error):
            self._h2.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
        self.close()

    def abort(self, reason: str) -> None:
        """Abort the connection and drop its unsent bytes."""
        if not self._transport.is_closing() or not self._output.closed:
            self._note("connection.cut", reason)
        self._output.abort()

    def _expect_closed(self, unsent_bytes: int) -> None:
        """Abort this closing connection if its client has read nothing since the last check. `unsent_bytes`: number of
        unsent bytes at the last check."""
        unsent = self._transport.get_write_buffer_size()
        if unsent >= unsent_bytes:
            self._transport.abort()
        else:
            self.call_later(CLOSE_S, self._expect_closed, unsent)
