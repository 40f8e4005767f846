"""uvicorn's HTTP/1 protocol, with bounds on everything that a client may send before a handler reads the request.

Problem: httptools parses all bytes at once, and uvicorn starts a task for each request. Received bytes are therefore
parsed in small pieces. No further piece is parsed while a request waits for an earlier response, or while a body waits
to be read. Meanwhile the unparsed bytes are kept and reading is paused.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Any, Final, cast

import httptools
from uvicorn import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from cluster.gateway.apis.http.connection import HttpConnection
from cluster.gateway.apis.http.connection_end import ConnectionEnd
from cluster.gateway.apis.http.received_bytes import ReceivedBytes, body_length
from cluster.gateway.apis.http.response_transport import ResponseTransport
from cluster.gateway.apis.http.timeouts import HttpTimeouts, TimeoutLimits
from cluster.http2 import ConnectionSlot, ConnectionStage

CONNECTION: Final = "headrace.connection"
"""The key under which the ASGI scope of a request holds the connection's `HttpConnection`."""
MAX_HEAD_BYTES: Final = 65_536
MAX_HEADERS: Final = 256
_HOST = re.compile(rb"[!-~]*")
_VERSIONS: Final = ("1.0", "1.1")


class _Refused(Exception):
    """Raised for an invalid request head."""


class _Flow(FlowControl):
    """uvicorn's flow control with two changes. It parses the received bytes before more bytes are read, and it reports
    to the handlers whether the client reads."""

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

    def pause_writing(self) -> None:
        super().pause_writing()
        self._protocol.connection.pause(True)

    def resume_writing(self) -> None:
        self._protocol.connection.pause(False)
        super().resume_writing()


class HttpProtocol(HttpToolsProtocol):
    """An HTTP/1 connection. The ASGI scope of each request holds the connection's `HttpConnection`."""

    timeouts: HttpTimeouts
    connection: HttpConnection
    _end: ConnectionEnd

    def __init__(self, config: Config, state: ServerState, held: ConnectionSlot, limits: TimeoutLimits) -> None:
        """`held`: the slot of this connection within the connection limit of the port."""
        super().__init__(config, state, {})
        self._held = held
        self._limits = limits
        self.received = ReceivedBytes()
        self.requests = 0
        """The number of requests that have begun."""
        self._parsing = False

    @property
    def stage(self) -> ConnectionStage:
        """The stage of the connection: SILENT before the first request, CALLING while a request is being answered, else
        GREETED."""
        calling = self.cycle is not None and not self.cycle.response_complete
        return (
            ConnectionStage.CALLING if calling else ConnectionStage.GREETED if self.requests else ConnectionStage.SILENT
        )

    def evict(self) -> None:
        """Close this connection, so that another connection can have its slot."""
        if self._held.authenticated and not self.transport.get_write_buffer_size():
            self.transport.close()
        else:
            self.transport.abort()

    # ---- asyncio.Protocol

    def connection_made(self, transport: Any) -> None:
        """Handle a new connection: occupy the connection's slot and start its timers."""
        super().connection_made(transport)
        self._held.connection = self
        if self._held.released:
            self.transport.abort()
        self.timeouts = HttpTimeouts(self._limits, self.loop.time())
        self.flow = _Flow(self)
        self._end = end = ConnectionEnd(transport, self.received, self.pipeline)
        self.connection = HttpConnection(transport, self.flow, self._held, end.refuse_body, end.end_after_answer)
        self._timer = self.loop.call_later(self._limits.check_s, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        """Handle the loss of the connection: release the slot and call the function that watches the connection."""
        self._held.release()
        self._timer.cancel()
        self._end.ignore_input()
        super().connection_lost(exc)
        self.connection.lose()

    def data_received(self, data: bytes) -> None:
        """Handle received bytes: add them to the unparsed bytes, and parse as much as is allowed now."""
        if self._end.ignores_input:
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
            if _must_wait(self.cycle, self.pipeline):
                self.flow.pause_reading()
                return
            self._feed(self.received.pop())
        self.received.clear()
        if not _must_wait(self.cycle, self.pipeline):
            self.flow.resume_reading()

    def _feed(self, piece: bytes) -> None:
        """Parse a piece of the received bytes. Also check the size of the request head, since the parser does not limit
        it."""
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:  # upgrades are not supported: the request is answered as plain HTTP
            self._end.stop_reading()
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._end.refuse(400, str(cause) if isinstance(cause, _Refused) else "Invalid HTTP request received.")
            return
        if self.received.count_head(len(piece)) > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._end.refuse(400, f"The request's head is larger than {MAX_HEAD_BYTES} bytes.")

    # ---- the parser's callbacks

    def on_message_begin(self) -> None:
        self.received.begin_head()
        super().on_message_begin()
        cast(dict[str, Any], self.scope)[CONNECTION] = self.connection

    def on_header(self, name: bytes, value: bytes) -> None:
        """Handle a parsed header. A header after the body (a trailer) is dropped: a proxy that checks headers may not
        check trailers, so a client could evade the check with them."""
        if self.received.in_body:
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
        self._end.begin_request(cycle)
        self.received.begin_body(body_length(self.headers))
        self.timeouts.ended_head()

    def on_body(self, body: bytes) -> None:
        self.received.count_body(len(body))
        self.timeouts.body(len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.received.end_request()
        if self.cycle.response_complete:
            self.timeouts.answered(self.loop.time(), complete=True)
        else:
            self.timeouts.ended_body()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Handle the end of a response: start the next request if one has arrived, else wait for one."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            now = self.loop.time()
            self.timeouts.answered(now, complete=not self.received.in_body)
            if self.received.head_bytes:
                self.timeouts.began_head(now)
        self.flow.resume_reading()

    # ---- closing

    def _check(self) -> None:
        self._timer = self.loop.call_later(self._limits.check_s, self._check)
        if self.flow.read_paused or (self.received.in_body and self.cycle.waiting_for_100_continue):
            self.timeouts.paused()
        late = self.timeouts.overdue(self.loop.time(), self.transport.get_write_buffer_size())
        if late is not None:
            self._end.time_out(late)


def _must_wait(newest: RequestResponseCycle | None, pipeline: deque[tuple[RequestResponseCycle, Any]]) -> bool:
    """Return whether parsed requests must be handled before more is parsed. `newest`: the newest request. `pipeline`:
    the requests that wait for an earlier response."""
    if newest is None or newest.response_complete:
        return False
    return bool(pipeline) or len(newest.body) > HIGH_WATER_LIMIT


def _check_head(version: str, headers: list[tuple[bytes, bytes]]) -> None:
    """Raise _Refused if the version is unsupported, or the request has no valid Host header or more than one."""
    if version not in _VERSIONS:
        raise _Refused("This port supports HTTP/1.1 and HTTP/1.0 only.")
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) != 1 or _HOST.fullmatch(hosts[0]) is None:
        raise _Refused("A request must have exactly one valid Host header.")
