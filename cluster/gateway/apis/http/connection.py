"""An HTTP/1 connection, in the form in which the handlers of its requests use it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from uvicorn.protocols.http.flow_control import FlowControl

from cluster.http2 import ConnectionSlot
from cluster.http2.limits import Bucket

UNPROVEN_REFUSALS_PER_S: Final = 10.0
UNPROVEN_REFUSALS: Final = 100.0
"""Size of a token bucket for the refused requests of a connection without an accepted credential. The bucket is
refilled at UNPROVEN_REFUSALS_PER_S requests a second."""


class HttpConnection:
    """A connection that handlers write to and watch. Implements the API's `ClientConnection`."""

    def __init__(
        self,
        transport: asyncio.Transport,
        flow: FlowControl,
        slot: ConnectionSlot,
        refuse_body: Callable[[], None],
        end: Callable[[], None],
    ) -> None:
        """`refuse_body`: closes the connection because the request's body arrives too slowly. `end`: disconnects the
        client after the current answer."""
        self.transport = transport
        self.refuse_body = refuse_body
        self.chunked = True
        """Whether the body of the response is sent in chunks; if not (HTTP/1.0), it ends with the connection."""
        self.full = False
        """Whether the client must read before more is written. A plain attribute and not a property, because it is read
        for every token."""
        self._flow = flow
        self._slot = slot
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._refusals = Bucket(UNPROVEN_REFUSALS_PER_S, UNPROVEN_REFUSALS, self._loop.time())
        self._lost = False
        self._on_lost: Callable[[], None] | None = None

    def send(self, data: bytes) -> None:
        """Send the next part of a response body without a content-length."""
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)

    async def wait_until_writable(self) -> None:
        """Wait until the connection accepts more bytes to send, or is closed."""
        await self._flow.drain()

    def pause(self, paused: bool) -> None:
        """Record whether writing is paused because the client does not read."""
        self.full = paused

    def mark_authenticated(self) -> None:
        """Record that the client presented a valid credential."""
        self._slot.mark_authenticated()

    def charge_refusal(self) -> None:
        """Count a refused request. A client without an accepted credential is disconnected after too many refused
        requests."""
        if not self._slot.authenticated and self._refusals.charge(1, self._loop.time()) < 0:
            self._end()

    def watch(self, lost: Callable[[], None]) -> None:
        """Register the function `lost`. It is called when the client disconnects, or soon if the client has
        disconnected already. Reading from the connection is resumed, because a disconnect is noticed only while
        reading."""
        self.watch_paused(lost)
        self._flow.resume_reading()

    def watch_paused(self, lost: Callable[[], None]) -> None:
        """Call `lost` when the connection is lost. Reading from the connection stays paused."""
        self._on_lost = lost
        if self._lost:
            self._loop.call_soon(lost)

    def unwatch(self, lost: Callable[[], None]) -> None:
        """Undo `watch` or `watch_paused`: a disconnect no longer calls `lost`. Does nothing if another function has
        been registered since."""
        if self._on_lost is lost:
            self._on_lost = None

    def lose(self) -> None:
        """Record that the connection is lost, and call the function that was passed to `watch` or `watch_paused`."""
        self._lost, self.full = True, False
        if self._on_lost is not None:
            self._on_lost()
