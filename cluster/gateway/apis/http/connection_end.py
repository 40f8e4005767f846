"""The end of an HTTP/1 connection that the gateway closes because of an error, a time limit or too many refusals."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from cluster.gateway.apis.http.received_bytes import ReceivedBytes
from cluster.gateway.apis.http.timeouts import Late


class ConnectionEnd:
    """Closes one connection. Decides which outstanding responses and which error the client still gets."""

    def __init__(
        self,
        transport: asyncio.Transport,
        received: ReceivedBytes,
        pipeline: deque[tuple[RequestResponseCycle, Any]],
    ) -> None:
        """`pipeline`: the requests that wait for an earlier response, newest first, each with its application."""
        self.ignores_input = False
        """Whether all further bytes from the client are ignored."""
        self._transport = transport
        self._received = received
        self._pipeline = pipeline
        self._newest: RequestResponseCycle | None = None
        """The newest request."""

    def begin_request(self, cycle: RequestResponseCycle) -> None:
        """Record a request whose head has been parsed."""
        self._newest = cycle

    def ignore_input(self) -> None:
        """Drop the bytes that are not parsed yet, and ignore all further bytes."""
        self.ignores_input = True
        self._received.clear()

    def stop_reading(self) -> None:
        """Answer the requests that were received so far, ignore all further bytes, and close the connection."""
        self.ignore_input()
        last = self._pipeline[0][0] if self._pipeline else self._newest
        if last is None or last.response_complete:
            self._transport.close()
        else:
            last.keep_alive = False

    def end_after_answer(self) -> None:
        """Close the connection after the response to the newest request. Ignore all further bytes."""
        assert self._newest is not None
        self._newest.keep_alive = False
        self.ignores_input = True

    def refuse_body(self) -> None:
        """Close the connection because the newest request's body arrives too slowly."""
        self.refuse(408, f"The connection is closed: {Late.BODY.value}.")

    def time_out(self, late: Late) -> None:
        """Close the connection because a time limit is exceeded."""
        if self._transport.is_closing() and late is not Late.UNREAD:
            return
        if late in (Late.HEAD, Late.BODY):
            self.refuse(408, f"The connection is closed: {late.value}.")
        elif late is Late.IDLE:
            self._transport.close()
        else:
            self._transport.abort()

    def refuse(self, status: int, message: str) -> None:
        """Answer an invalid request with an error and close the connection. If earlier responses are outstanding, the
        client gets only these responses, without the error."""
        newest = self._newest
        if newest is not None and not newest.response_complete:
            if not self._received.in_body:
                self.stop_reading()
                return
            if self._pipeline or newest.response_started:  # the newest request is the invalid one
                self._transport.abort()
                return
            newest.disconnected = True
            newest.message_event.set()
        self.ignores_input = True
        content = message.encode()
        head = b"content-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self._transport.write(STATUS_LINE[status] + head % len(content) + content)
        self._transport.close()
