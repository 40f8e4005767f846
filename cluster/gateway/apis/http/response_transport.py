"""The transport of one HTTP response, which sends the head of the response together with the first part of its body.

Without this transport, uvicorn would write the head and this part separately, which costs a second system call, and
often a second wake-up of the client.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

MAX_JOINED_BYTES: Final = 65_536
"""Size in bytes from which the first part of a body is written by itself instead of being copied behind the head."""


_CHUNKED: Final = b"transfer-encoding: chunked\r\n"


class Response(Protocol):
    """The state of a response that ResponseTransport reads. uvicorn's RequestResponseCycle satisfies this protocol."""

    response_started: bool
    chunked_encoding: bool | None


class ResponseTransport:
    """The part of a transport's interface that uvicorn's RequestResponseCycle uses (a test compares them). The head of
    a response is held back until the first part of the body is written. The application must therefore write that part
    without delay."""

    __slots__ = ("_chunks", "_head", "_response", "_transport")

    def __init__(self, transport: asyncio.Transport, response: Response, chunks: bool) -> None:
        """`chunks`: whether the client understands a body in chunks. If not, the end of the connection ends the body;
        uvicorn sends chunks in any case."""
        self._chunks = chunks
        self._transport = transport
        self._response = response
        self._head: bytes | None = None
        """The head while it waits for the first part of the body; None before there is a head, b"" after it was
        sent."""

    def write(self, data: bytes) -> None:
        """Write the next bytes: an interim response (100 Continue), the head of the response, or a part of its body."""
        head = self._head
        if not self._chunks and self._response.chunked_encoding:
            data = data.replace(_CHUNKED, b"", 1) if head is None else _body_of_chunks(data)
        if head is None and self._response.response_started:
            self._head = data
            return
        if head:
            self._head = b""
            if len(data) < MAX_JOINED_BYTES:
                data = head + data
            else:
                self._transport.write(head)
        self._transport.write(data)

    def is_closing(self) -> bool:
        """Return whether the connection is closed or being closed."""
        return self._transport.is_closing()

    def close(self) -> None:
        """Send what was written and close the connection."""
        if self._head:
            self._transport.write(self._head)
            self._head = b""
        self._transport.close()


def _body_of_chunks(data: bytes) -> bytes:
    """Return the content of a write of uvicorn: at most one chunk, and the mark of the body's end."""
    size, _, rest = data.partition(b"\r\n")
    return rest[: int(size, 16)]
