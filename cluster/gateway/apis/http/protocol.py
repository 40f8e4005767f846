"""uvicorn's HTTP/1 protocol, with bounds on everything that a client may send before a handler reads the request.

Problem: httptools parses all bytes at once, and uvicorn starts a task for each request. Received bytes are therefore
parsed in small pieces. No further piece is parsed while a request waits for an earlier response, or while a body waits
to be read. Meanwhile the unparsed bytes are kept and reading is paused.
"""

from __future__ import annotations

import re
from collections import deque
from types import SimpleNamespace
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
_ABSOLUTE = re.compile(rb"https?://([^/?#]+)", re.IGNORECASE)
_FRAMING: Final = (b"content-length", b"transfer-encoding")
_VERSIONS: Final = ("1.0", "1.1")


class _Refused(Exception):
    """Raised for an invalid request head."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


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
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade()
            if not self._end.ignores_input:
                self._feed(piece[upgrade.args[0] :])
            return
        except httptools.HttpParserError as error:
            if self._end.ignores_input:
                return
            cause = error.__context__
            if not isinstance(cause, _Refused):
                cause = _Refused("Invalid HTTP request received.")
            self._end.refuse(cause.status, str(cause))
            return
        if self.received.count_head(len(piece)) > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._end.refuse(400, f"The request's head is larger than {MAX_HEAD_BYTES} bytes.")

    def _ignore_upgrade(self) -> None:
        """Answer a request with the header Upgrade as plain HTTP, and close the connection after it. llhttp ends such a
        request at its head, so a second parser, which gets only the headers that frame the body, reads the body."""

        def on_body(body: bytes) -> None:
            if not self._end.ignores_input:
                self.on_body(body)

        def on_message_complete() -> None:
            if not self._end.ignores_input:
                self.on_message_complete()
                self._end.stop_reading()

        framing = [b"%b: %b\r\n" % (name, value) for name, value in self.headers if name in _FRAMING]
        self.parser = httptools.HttpRequestParser(
            SimpleNamespace(on_body=on_body, on_message_complete=on_message_complete)
        )
        self.parser.feed_data(b"POST / HTTP/1.1\r\n" + b"".join(framing) + b"\r\n")

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
        if target := _ABSOLUTE.match(self.url):  # its host is the one that counts (RFC 9112, section 3.2.2)
            self.headers[:] = [(name, target[1] if name == b"host" else value) for name, value in self.headers]
            rest = self.url[target.end() :]
            self.url = rest if rest.startswith(b"/") else b"/" + rest
        version = self.parser.get_http_version()
        self.expect_100_continue = _check_head(version, self.headers)
        self.connection.chunked = chunks = version != "1.0"
        self.requests += 1
        super().on_headers_complete()
        cycle: Any = self.cycle
        if cycle.scope["method"] != "HEAD":  # the answer to HEAD has no body that its head could wait for
            cycle.transport = ResponseTransport(self.transport, cycle, chunks)
        self._end.begin_request(cycle)
        self.received.begin_body(body_length(self.headers))
        self.timeouts.ended_head()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        super()._start_asgi_task(cycle, _without_body(cycle, app) if cycle.waiting_for_100_continue else app)

    def on_body(self, body: bytes) -> None:
        self.received.count_body(len(body))
        self.timeouts.body(len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():  # see _ignore_upgrade
            return
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


def _without_body(cycle: RequestResponseCycle, app: Any) -> Any:
    """Return an application whose answer closes the connection if it is sent before the client was asked for the body
    (100 Continue). The server could not tell whether the client's next bytes are this body or another request."""

    async def closing(scope: Any, receive: Any, send: Any) -> None:
        async def send_last(message: Any) -> None:
            if cycle.waiting_for_100_continue and cycle.more_body and not cycle.body:
                cycle.keep_alive = False
            await send(message)

        await app(scope, receive, send_last)

    return closing


def _check_head(version: str, headers: list[tuple[bytes, bytes]]) -> bool:
    """Return whether the client waits for 100 Continue before it sends the body, which HTTP/1.0 does not have. Raises
    _Refused if the version is unsupported, the request has no valid Host header or more than one, or the client expects
    anything else."""
    if version not in _VERSIONS:
        raise _Refused("This port supports HTTP/1.1 and HTTP/1.0 only.")
    hosts, expected = [], set[bytes]()
    for name, value in headers:
        if name == b"host":
            hosts.append(value)
        elif name == b"expect":
            expected.update(part.strip().lower() for part in value.split(b","))
    if len(hosts) != 1 or _HOST.fullmatch(hosts[0]) is None:
        raise _Refused("A request must have exactly one valid Host header.")
    if not expected or version == "1.0":
        return False
    if not expected <= {b"", b"100-continue"}:
        raise _Refused("The Expect header may only be 100-continue; remove it, or send this value.", 417)
    return b"100-continue" in expected
