"""uvicorn's HTTP/1 protocol, with bounds on everything that a client may send before a handler reads the request.

Problem: httptools parses all bytes at once, and uvicorn starts a task for each request. Received bytes are therefore
parsed in small pieces. No further piece is parsed while a request waits for an earlier response, or while a body waits
to be read. Meanwhile the unparsed bytes are kept and reading is paused.
"""

from __future__ import annotations

import re
from typing import Any, Final, cast

import httptools
from uvicorn import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from cluster.gateway.apis.http.connection import HttpConnection
from cluster.gateway.apis.http.response_transport import ResponseTransport
from cluster.gateway.apis.http.timeouts import HttpTimeouts, Late, TimeoutLimits
from cluster.http2 import ConnectionSlot, ConnectionStage

CONNECTION: Final = "headrace.connection"
"""The key under which the ASGI scope of a request holds the connection's `HttpConnection`."""
MAX_HEAD_BYTES: Final = 65_536
MAX_HEADERS: Final = 256
HEAD_PIECE_BYTES: Final = 4096
"""Number of bytes that are parsed at once outside of a body: about a hundred of the smallest requests, which take a
millisecond."""
BODY_PIECE_BYTES: Final = 16_384
"""Upper bound on the bytes that are parsed at once while a body of unknown length arrives. These bytes may hold
thousands of chunks or some hundred requests."""
LONG_PIECE_BYTES: Final = 1 << 16
"""Upper bound on the bytes that are parsed at once while a body of known length arrives. The parser only copies these
bytes."""
MAX_LENGTH_DIGITS: Final = 18
_HOST = re.compile(rb"[!-~]*")
_VERSIONS: Final = ("1.0", "1.1")


class _Refused(Exception):
    """Raised for an invalid request head."""


class ReceivedBytes:
    """The received bytes of one connection that are not parsed yet, and the size of the head that is being parsed."""

    def __init__(self) -> None:
        self._data = b""
        self._parsed_to = 0
        self._in_head = True
        self._progress = False
        """Whether the last piece ended a head or a request, or held a part of a body."""
        self.head_bytes = 0
        """Number of parsed bytes of an unfinished head."""

    @property
    def size(self) -> int:
        """Number of bytes that are not parsed yet."""
        return len(self._data) - self._parsed_to

    def append(self, data: bytes) -> None:
        """Add received bytes."""
        self._data = self._data[self._parsed_to :] + data if self.size else data
        self._parsed_to = 0

    def pop(self, size: int) -> bytes:
        """Remove and return up to `size` bytes, which the parser gets next."""
        piece = self._data[self._parsed_to : self._parsed_to + size]
        self._parsed_to += len(piece)
        self._in_head, self._progress = True, False
        return piece

    def clear(self) -> None:
        """Drop the bytes."""
        self._data, self._parsed_to = b"", 0

    def begin_head(self) -> None:
        """Record that the parser has begun a head."""
        self._in_head = True

    def end_head(self) -> None:
        """Record that the parser is past the head: in a body, or at the end of a request."""
        self._in_head, self._progress = False, True

    def count_head(self, size: int) -> int:
        """Count a parsed piece of `size` bytes, and return the number of parsed bytes of the unfinished head."""
        before = 0 if self._progress else self.head_bytes
        self.head_bytes = before + size if self._in_head else 0
        return self.head_bytes


class _Flow(FlowControl):
    """uvicorn's flow control, changed to parse the received bytes before more bytes are read."""

    def __init__(self, protocol: HttpProtocol) -> None:
        super().__init__(protocol.transport)
        self._protocol = protocol

    def pause_reading(self) -> None:
        self._protocol.timeouts.paused()
        super().pause_reading()

    def resume_reading(self) -> None:
        if unparsed := self._protocol.received.size:
            self._protocol.parse_soon()
        if self.read_paused and unparsed <= HIGH_WATER_LIMIT:
            super().resume_reading()


class HttpProtocol(HttpToolsProtocol):
    """An HTTP/1 connection. The ASGI scope of each request holds the connection's `HttpConnection`."""

    timeouts: HttpTimeouts
    connection: HttpConnection

    def __init__(self, config: Config, state: ServerState, held: ConnectionSlot, limits: TimeoutLimits) -> None:
        """`held`: the slot of this connection within the connection limit of the port."""
        super().__init__(config, state, {})
        self._held = held
        self._limits = limits
        self.received = ReceivedBytes()
        self.requests = 0
        """The number of requests that have begun."""
        self._in_body = False
        self._body_left = 0
        """Number of bytes of the body that are still to come, if the head states the body's length; otherwise 0 or
        less."""
        self._parsing = False
        self._ignoring_input = False
        """Whether all further bytes from the client are ignored."""

    @property
    def stage(self) -> ConnectionStage:
        """The stage of the connection: SILENT before the first request, CALLING while a request is being answered, else
        GREETED."""
        calling = self.cycle is not None and not self.cycle.response_complete
        return (
            ConnectionStage.CALLING if calling else ConnectionStage.GREETED if self.requests else ConnectionStage.SILENT
        )

    def evict(self) -> None:
        """Close this connection to free the slot for another connection."""
        if self._held.authenticated and not self.transport.get_write_buffer_size():
            self.transport.close()
        else:
            self.transport.abort()

    # ---- asyncio.Protocol

    def connection_made(self, transport: Any) -> None:
        """Handle a new connection: occupy the slot and start the timers."""
        super().connection_made(transport)
        self._held.connection = self
        if self._held.released:
            self.transport.abort()
        self.timeouts = HttpTimeouts(self._limits, self.loop.time())
        self.flow = _Flow(self)
        self.connection = HttpConnection(transport, self.flow, self._held, self._refuse_body, self._end_after_answer)
        self._timer = self.loop.call_later(self._limits.check_s, self._check)

    def pause_writing(self) -> None:
        """Handle a full write buffer: the client does not read."""
        super().pause_writing()
        self.connection.pause(True)

    def resume_writing(self) -> None:
        """Handle a drained write buffer: the client reads again."""
        self.connection.pause(False)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Handle the loss of the connection: release the slot and notify the watcher."""
        self._held.release()
        self._timer.cancel()
        self._ignoring_input = True
        self.received.clear()
        super().connection_lost(exc)
        self.connection.lose()

    def data_received(self, data: bytes) -> None:
        """Handle received bytes: append the bytes to the unparsed bytes, and parse as far as allowed."""
        if self._ignoring_input:
            return
        self.timeouts.began_head(self.loop.time())
        self.received.append(data)
        if not self._parsing:
            self._parse()

    # ---- parsing in pieces

    def parse_soon(self) -> None:
        """Continue parsing in the next pass of the event loop."""
        if not self._parsing:
            self._parsing = True
            self.loop.call_soon(self._parse)

    def _parse(self) -> None:
        self._parsing = False
        while self.received.size and not self.transport.is_closing():
            if self._must_wait():
                self.flow.pause_reading()
                return
            self._feed(self.received.pop(self._piece_bytes()))
        self.received.clear()
        if not self._must_wait():
            self.flow.resume_reading()

    def _piece_bytes(self) -> int:
        """Return how many of the received bytes may be parsed at once."""
        if not self._in_body:
            return HEAD_PIECE_BYTES
        return max(min(self._body_left, LONG_PIECE_BYTES), BODY_PIECE_BYTES)

    def _must_wait(self) -> bool:
        """Whether parsed requests must be handled before more is parsed."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return False
        return bool(self.pipeline) or len(cycle.body) > HIGH_WATER_LIMIT

    def _feed(self, piece: bytes) -> None:
        """Parse a piece of the received bytes. Also check the size of the head, since the parser does not check it."""
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:  # upgrades are not supported: the request is answered as plain HTTP
            self._stop_reading()
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(400, str(cause) if isinstance(cause, _Refused) else "Invalid HTTP request received.")
            return
        if self.received.count_head(len(piece)) > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(400, f"The request's head is larger than {MAX_HEAD_BYTES} bytes.")

    # ---- the parser's callbacks

    def on_message_begin(self) -> None:
        self.received.begin_head()
        super().on_message_begin()
        cast(dict[str, Any], self.scope)[CONNECTION] = self.connection

    def on_header(self, name: bytes, value: bytes) -> None:
        """Handle a parsed header. A header after the body (a trailer) is dropped: a proxy that checks headers may not
        check trailers, so a client could evade the check with them."""
        if self._in_body:
            return
        if len(self.headers) >= MAX_HEADERS:
            raise _Refused(f"The request has more than {MAX_HEADERS} headers.")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self.received.end_head()
        _check_head(self.parser.get_http_version(), self.headers)
        self.requests += 1
        super().on_headers_complete()
        cycle: Any = self.cycle
        if cycle.scope["method"] != "HEAD":  # the answer to HEAD has no body that its head could wait for
            cycle.transport = ResponseTransport(self.transport, cycle)
        self._in_body = True
        self._body_left = body_length(self.headers)
        self.timeouts.ended_head()

    def on_body(self, body: bytes) -> None:
        self.received.end_head()
        self._body_left -= len(body)
        self.timeouts.body(len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        self.received.end_head()
        if self.cycle.response_complete:
            self.timeouts.answered(self.loop.time(), complete=True)
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
            if self.received.head_bytes:
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
        self.received.clear()
        last = self.pipeline[0][0] if self.pipeline else self.cycle
        if last is None or last.response_complete:
            self.transport.close()
        else:
            last.keep_alive = False

    def _end_after_answer(self) -> None:
        self.cycle.keep_alive = False
        self._ignoring_input = True

    def _refuse_body(self) -> None:
        self._refuse(408, f"The connection is closed: {Late.BODY.value}.")

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


def body_length(headers: list[tuple[bytes, bytes]]) -> int:
    """Return the length of the body according to the headers; 0 if the headers state no length."""
    lengths = [value for name, value in headers if name == b"content-length"]
    if len(lengths) != 1 or any(name == b"transfer-encoding" for name, _ in headers):
        return 0
    return int(lengths[0]) if lengths[0].isdigit() and len(lengths[0]) <= MAX_LENGTH_DIGITS else 0


def _check_head(version: str, headers: list[tuple[bytes, bytes]]) -> None:
    """Raise _Refused if the version is unsupported, or the request has no valid Host header or more than one."""
    if version not in _VERSIONS:
        raise _Refused("This port supports HTTP/1.1 and HTTP/1.0 only.")
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) != 1 or _HOST.fullmatch(hosts[0]) is None:
        raise _Refused("A request must have exactly one valid Host header.")
