"""The way of a call's pieces from the link to the connections: all that one message of a worker brings, in one pass.

A task that is woken for each piece costs about as much as everything else that Python does for it. So a stream that
has begun has no task on its way: the call's listener marks its lane, and one callback writes what all marked lanes
have to say, straight to their connections. A lane halts, and its task takes over, when its call has ended or its
client reads too slowly; what comes meanwhile is one larger piece afterwards.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from cluster.api.outcomes import CallError
from cluster.gateway.call import Call
from cluster.gateway.http_answers import KEEP_ALIVE, Stream

LANES_A_PASS = 128
"""About a millisecond of writes, before the event loop turns to others."""


class Connection(Protocol):
    """What a lane needs of the server's connection, once the head of a chunked response is sent."""

    @property
    def full(self) -> bool:
        """Whether the client must read before more is written."""

    def write_chunk(self, data: bytes) -> None:
        """Send one chunk of the body now."""

    async def drained(self) -> None:
        """Wait until it is full no longer, or closed."""


class Lane:
    """One call's way to its connection. `run` returns when the call's end is told and raises the call's error."""

    def __init__(self, call: Call, stream: Stream, shift: int, connection: Connection, relay: Relay) -> None:
        self._call = call
        self._stream = stream
        self._shift = shift
        self._connection = connection
        self._relay = relay
        self._halted: asyncio.Future[bool] = relay.loop.create_future()
        self._error: CallError | None = None
        self.marked = False

    async def run(self) -> None:
        """Relay to the end."""
        self._call.listener = self.mark
        try:
            self.mark()
            while not await self._halted:
                await self._connection.drained()
                self._halted = self._relay.loop.create_future()
                self.mark()
        finally:
            self._call.listener = None
            self._halted.cancel()
        if self._error is not None:
            raise self._error

    def mark(self) -> None:
        """There is news."""
        if not self.marked:
            self.marked = True
            self._relay.add(self)

    def write(self) -> None:
        """Send what there is, or halt."""
        self.marked = False
        if self._halted.done():
            return
        call = self._call
        if self._connection.full:
            self._halted.set_result(False)
            return
        try:
            pieces = call.take()
        except CallError as error:
            self._error = error
            self._halted.set_result(True)
            return
        if pieces:
            self._connection.write_chunk(self._stream.events(call, pieces, self._shift))
            if pieces[-1].finish_reason and call.told:
                self._halted.set_result(True)
        elif call.silent:
            call.silent = False
            self._connection.write_chunk(KEEP_ALIVE)


class Relay:
    """The marked lanes of a gateway."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._marked: deque[Lane] = deque()

    def add(self, lane: Lane) -> None:
        """Write this lane in the next pass."""
        if not self._marked:
            self.loop.call_soon(self._pass)
        self._marked.append(lane)

    def _pass(self) -> None:
        for _ in range(min(LANES_A_PASS, len(self._marked))):
            self._marked.popleft().write()
        if self._marked:
            self.loop.call_soon(self._pass)
