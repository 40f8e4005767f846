"""uvicorn's HTTP/1 protocol, with bounds on everything that a client may send before a handler reads the request.

Problem: httptools parses all bytes at once, and uvicorn starts a task for each request. Received bytes are therefore
parsed in small pieces. No further piece is parsed while a request waits for an earlier response, or while a body waits
to be read. Meanwhile this class keeps the unparsed bytes and pauses reading.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, cast

import httptools
from uvicorn import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from cluster.gateway.apis.http.timeouts import ConnectionTimeouts, Late, TimeoutLimits
from cluster.http2 import ConnectionSlot, ConnectionStage
from cluster.http2.limits import Bucket

CONNECTION: Final = "headrace.connection"
"""The key under which the ASGI scope of a request holds the protocol object of the connection."""
MAX_HEAD_BYTES: Final = 65_536
MAX_HEADERS: Final = 256
HEAD_PIECE_BYTES: Final = 4096
"""Number of bytes that are parsed at once outside of a body: about a hundred of the smallest requests, which take a
millisecond."""
BODY_PIECE_BYTES: Final = 16_384
UNPROVEN_REFUSALS_PER_S: Final = 10.0
UNPROVEN_REFUSALS: Final = 100.0
"""Size of a token bucket for the refused requests of a connection without an accepted credential. The bucket is
refilled at UNPROVEN_REFUSALS_PER_S requests a second."""
_HOST = re.compile(rb"[!-~]*")
_VERSIONS: Final = ("1.0", "1.1")


class _Refused(Exception):
    """Raised for an invalid request head."""


class _Flow(FlowControl):
    """uvicorn's flow control, changed to parse the received bytes before more bytes are read."""

    def __init__(self, protocol: HttpProtocol) -> None:
        super().__init__(protocol.transport)
        self._protocol = protocol

    def pause_reading(self) -> None:
        self._protocol.timeouts.paused()
        super().pause_reading()

    def resume_reading(self) -> None:
        unparsed = self._protocol.unparsed_bytes
        if unparsed:
            self._protocol.parse_soon()
        if unparsed <= HIGH_WATER_LIMIT:
            super().resume_reading()


class HttpProtocol(HttpToolsProtocol):
    """An HTTP/1 connection. The ASGI scope of each request holds this object, as the API's `ClientConnection`."""

    full = False
    """Whether the client must read before more is written. A plain attribute, since every token checks it."""
    timeouts: ConnectionTimeouts
    requests = 0
    """The number of requests that have begun."""
    _lost = False
    _on_lost: Callable[[], None] | None = None
    _unparsed = b""
    _parsed_to = 0
    _parsing = False
    _ignoring_input = False
    """Whether all further bytes from the client are ignored."""
    _head_bytes = 0
    _in_head = True
    _in_body = False
    _progress = False
    """Whether the last piece ended a head or a request, or held a part of a body."""

    def __init__(self, config: Config, state: ServerState, held: ConnectionSlot, limits: TimeoutLimits) -> None:
        """`held`: the slot of this connection within the connection limit of the port."""
        super().__init__(config, state, {})
        self._held = held
        self._limits = limits

    # ---- the connection's slot

    @property
    def stage(self) -> ConnectionStage:
        """The stage that the connection has reached."""
        calling = self.cycle is not None and not self.cycle.response_complete
        return (
            ConnectionStage.CALLING if calling else ConnectionStage.GREETED if self.requests else ConnectionStage.SILENT
        )

    def mark_authenticated(self) -> None:
        """Record that the client presented a valid credential."""
        self._held.mark_authenticated()

    def charge_refusal(self) -> None:
        """Count a refused request. An unauthenticated client with too many refused requests is disconnected after the
        current answer."""
        if not self._held.authenticated and self._refusals.charge(1, self.loop.time()) < 0:
            self.cycle.keep_alive = False
            self._ignoring_input = True

    def evict(self) -> None:
        """Close this connection to free the slot for another connection."""
        if self._held.authenticated and not self.transport.get_write_buffer_size():
            self.transport.close()
        else:
            self.transport.abort()

    # ---- the API's ClientConnection

    def send(self, data: bytes) -> None:
        """Send one chunk of a chunked response body. Every response without a content-length is chunked."""
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def wait_until_writable(self) -> None:
        """Wait until the connection is no longer full, or is closed."""
        await self.flow.drain()

    def watch(self, lost: Callable[[], None]) -> None:
        """Call `lost` once the client is gone. If the client is gone already, call `lost` soon. Reading is resumed, so
        that a disconnect is noticed."""
        self.watch_paused(lost)
        self.flow.resume_reading()

    def watch_paused(self, lost: Callable[[], None]) -> None:
        """Call `lost` once the connection is lost, without resuming reading."""
        self._on_lost = lost
        if self._lost:
            self.loop.call_soon(lost)

    def unwatch(self, lost: Callable[[], None]) -> None:
        """Stop calling `lost`."""
        if self._on_lost is lost:
            self._on_lost = None

    def refuse_body(self) -> None:
        """Close the connection because the request's body arrives too slowly."""
        self._refuse(408, f"The connection is closed: {Late.BODY.value}.")

    # ---- asyncio.Protocol

    def connection_made(self, transport: Any) -> None:
        """Handle a new connection: occupy the slot and start the timers."""
        super().connection_made(transport)
        self._held.connection = self
        if self._held.released:
            self.transport.abort()
        self.timeouts = ConnectionTimeouts(self._limits, self.loop.time())
        self._refusals = Bucket(UNPROVEN_REFUSALS_PER_S, UNPROVEN_REFUSALS, self.loop.time())
        self.flow = _Flow(self)
        self._timer = self.loop.call_later(self._limits.check_s, self._check)

    def pause_writing(self) -> None:
        """Handle a full write buffer by setting `full`: the client does not read."""
        super().pause_writing()
        self.full = True

    def resume_writing(self) -> None:
        """Handle a drained write buffer by clearing `full`: the client reads again."""
        self.full = False
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Handle the loss of the connection: release the slot and notify the watcher."""
        self._held.release()
        self._timer.cancel()
        self.full = False
        self._ignoring_input = True
        self._unparsed = b""
        super().connection_lost(exc)
        self._lost = True
        if self._on_lost is not None:
            self._on_lost()

    def data_received(self, data: bytes) -> None:
        """Handle received bytes: append the bytes to the unparsed bytes, and parse as far as allowed."""
        if self._ignoring_input:
            return
        self.timeouts.began_head(self.loop.time())
        self._unparsed = self._unparsed[self._parsed_to :] + data if self.unparsed_bytes else data
        self._parsed_to = 0
        if not self._parsing:
            self._parse()

    # ---- parsing in pieces

    @property
    def unparsed_bytes(self) -> int:
        """Number of bytes that are received and not yet parsed."""
        return len(self._unparsed) - self._parsed_to

    def parse_soon(self) -> None:
        """Continue parsing in the next pass of the event loop."""
        if not self._parsing:
            self._parsing = True
            self.loop.call_soon(self._parse)

    def _parse(self) -> None:
        self._parsing = False
        while self.unparsed_bytes and not self.transport.is_closing():
            if self._must_wait():
                self.flow.pause_reading()
                return
            size = BODY_PIECE_BYTES if self._in_body else HEAD_PIECE_BYTES
            piece = self._unparsed[self._parsed_to : self._parsed_to + size]
            self._parsed_to += len(piece)
            self._feed(piece)
        self._unparsed, self._parsed_to = b"", 0
        if not self._must_wait():
            self.flow.resume_reading()

    def _must_wait(self) -> bool:
        """Whether parsed requests must be handled before more is parsed."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return False
        return bool(self.pipeline) or len(cycle.body) > HIGH_WATER_LIMIT

    def _feed(self, piece: bytes) -> None:
        """Parse a piece of the received bytes. Also check the size of the request head, which the parser does not
        check."""
        self._in_head, self._progress = True, False
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:  # upgrades are not supported: the request is answered as plain HTTP
            self._stop_reading()
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(400, str(cause) if isinstance(cause, _Refused) else "Invalid HTTP request received.")
            return
        before = 0 if self._progress else self._head_bytes
        self._head_bytes = before + len(piece) if self._in_head else 0
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(400, f"The request's head is larger than {MAX_HEAD_BYTES} bytes.")

    # ---- the parser's callbacks

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()
        cast(dict[str, Any], self.scope)[CONNECTION] = self

    def on_header(self, name: bytes, value: bytes) -> None:
        """Handle a parsed header or trailer. A trailer is dropped, since a proxy that checks headers does not see
        trailers."""
        if self._in_body:
            return
        if len(self.headers) >= MAX_HEADERS:
            raise _Refused(f"The request has more than {MAX_HEADERS} headers.")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._progress = False, True
        self._check_head()
        self.requests += 1
        super().on_headers_complete()
        self._in_body = True
        self.timeouts.ended_head()

    def _check_head(self) -> None:
        if self.parser.get_http_version() not in _VERSIONS:
            raise _Refused("This port supports HTTP/1.1 and HTTP/1.0 only.")
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) != 1 or _HOST.fullmatch(hosts[0]) is None:
            raise _Refused("A request must have exactly one valid Host header.")

    def on_body(self, body: bytes) -> None:
        self._in_head, self._progress = False, True
        self.timeouts.body(len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head = self._in_body = False
        self._progress = True
        if self.cycle.response_complete:
            self.timeouts.ended_leftover(self.loop.time())
        else:
            self.timeouts.ended_body()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Handle the end of a response: start the next request, or wait for a request."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            now = self.loop.time()
            self.timeouts.answered(now, complete=not self._in_body)
            if self._head_bytes:
                self.timeouts.began_head(now)
        self.flow.resume_reading()

    # ---- closing

    def _check(self) -> None:
        self._timer = self.loop.call_later(self._limits.check_s, self._check)
        if self.flow.read_paused or (self._in_body and self.cycle.waiting_for_100_continue):
            self.timeouts.paused()
        late = self.timeouts.overdue(self.loop.time(), self.transport.get_write_buffer_size())
        if late is None or (self.transport.is_closing() and late is not Late.UNREAD):
            return
        if late in (Late.HEAD, Late.BODY):
            self._refuse(408, f"The connection is closed: {late.value}.")
        elif late is Late.IDLE:
            self.transport.close()
        else:
            self.transport.abort()

    def _stop_reading(self) -> None:
        """Answer the requests that were received so far, ignore all further bytes, and close the connection."""
        self._ignoring_input = True
        self._unparsed, self._parsed_to = b"", 0
        last = self.pipeline[0][0] if self.pipeline else self.cycle
        if last is None or last.response_complete:
            self.transport.close()
        else:
            last.keep_alive = False

    def _refuse(self, status: int, message: str) -> None:
        """Answer an invalid request with an error and close the connection. If earlier responses are outstanding, only
        those are sent before the connection is closed."""
        cycle = self.cycle
        if self._in_body and not cycle.response_complete:  # the last request is the invalid one
            if self.pipeline or cycle.response_started:
                self.transport.abort()
                return
            cycle.disconnected = True
            cycle.message_event.set()
        elif cycle is not None and not cycle.response_complete:
            self._stop_reading()
            return
        self._ignoring_input = True
        content = message.encode()
        head = b"content-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + head % len(content) + content)
        self.transport.close()
