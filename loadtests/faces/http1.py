"""Lean HTTP/1.1 connection for one streamed answer at a time. It is lean because the load driver must use less CPU time
than the servers that it measures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from loadtests.faces.base import CallFailed

MAX_HEAD_BYTES = 65_536


class Connection(asyncio.Protocol):
    """Connection that is kept alive between answers. `on_body` gets the decoded body in pieces, as they arrive."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._state = self._head
        self._left = 0
        self._chunked = False
        self._on_body: Callable[[bytes], None] = lambda data: None
        self._done: asyncio.Future[int] | None = None
        self._status = 0
        self._keep = True

    @property
    def usable(self) -> bool:
        """Whether another request may be sent on the connection."""
        return self._transport is not None and not self._transport.is_closing() and self._keep

    async def request(self, head_and_body: bytes, on_body: Callable[[bytes], None]) -> int:
        """Send a request and return the status once the whole body has arrived. Raises CallFailed(BROKEN) if the
        connection ends earlier.
        """
        assert self._transport is not None
        self._on_body, self._state, self._status = on_body, self._head, 0
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(head_and_body)
        try:
            return await self._done
        finally:
            self._done = None

    def close(self) -> None:
        """Close the connection. The server sees a cancelled request."""
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Handle a new connection: store the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Decode all complete parts of the received data."""
        self._buffer += data
        try:
            while self._done is not None and self._state():
                pass
        except (ValueError, IndexError) as error:
            self._fail(CallFailed(CallFailed.PROTOCOL, f"no event stream over HTTP/1.1: {error}"))
            self.close()

    def eof_received(self) -> bool:
        """Return False, so that the transport closes. connection_lost then decides whether the body is complete."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """Handle the end of the connection: complete a running request whose body lasts until the connection ends, and
        fail any other running request."""
        self._transport = None
        if self._state == self._until_closed and error is None:
            self._finish()
        else:
            self._fail(CallFailed(CallFailed.BROKEN, f"the connection ended: {error or 'closed by the server'}"))

    # -- the states; each returns whether the state has advanced

    def _head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise ValueError("the response head has no end")
            return False
        lines = bytes(self._buffer[:end]).split(b"\r\n")
        del self._buffer[: end + 4]
        protocol, status = lines[0].split(b" ", 2)[:2]
        if not protocol.startswith(b"HTTP/1."):
            raise ValueError(f"it answers {protocol[:20]!r}")
        self._status = int(status)
        if self._status == 100:
            return True
        headers = {n.strip().lower(): v.strip() for n, _, v in (line.partition(b":") for line in lines[1:])}
        self._keep = headers.get(b"connection", b"").lower() != b"close"
        self._chunked = headers.get(b"transfer-encoding", b"").lower() == b"chunked"
        if self._chunked:
            self._state = self._size
        elif b"content-length" in headers:
            self._left = int(headers[b"content-length"])
            self._state = self._body
        else:
            self._keep = False
            self._state = self._until_closed
        return True

    def _size(self) -> bool:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            return False
        self._left = int(bytes(self._buffer[:end]).split(b";")[0], 16)
        del self._buffer[: end + 2]
        self._state = self._body if self._left else self._trailer
        return True

    def _body(self) -> bool:
        if self._left and not self._buffer:
            return False
        piece = bytes(self._buffer[: self._left])
        del self._buffer[: len(piece)]
        self._left -= len(piece)
        if piece:
            self._on_body(piece)
        if self._left == 0:
            if not self._chunked:
                self._finish()
                return False
            self._state = self._after_chunk
        return True

    def _after_chunk(self) -> bool:
        if len(self._buffer) < 2:
            return False
        del self._buffer[:2]
        self._state = self._size
        return True

    def _trailer(self) -> bool:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            return False
        del self._buffer[: end + 2]
        if end == 0:
            self._finish()
            return False
        return True

    def _until_closed(self) -> bool:
        if self._buffer:
            piece = bytes(self._buffer)
            self._buffer.clear()
            self._on_body(piece)
        return False

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(self._status)

    def _fail(self, error: CallFailed) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
