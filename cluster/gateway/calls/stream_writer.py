"""The way of a call's pieces from the link to the connections: all that one message of a worker brings, in one pass.

A task that is woken for each piece costs about as much as everything else that Python does for it. So a stream that
has begun has no task on its way. A token with nothing but text goes from the link straight to its connection
(`Output.direct`). For whatever else there is to tell, the call's listener marks its lane, and one callback writes what
all marked lanes have to say. A lane halts, and its task takes over, when its call has ended or its client reads too
slowly; what comes meanwhile is one larger piece afterwards.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from cluster.api.outcomes import CallError
from cluster.gateway.calls.call import Call

LANES_A_PASS = 128
"""About a millisecond of writes, before the event loop turns to others."""


class Transport(Protocol):
    """What a lane needs of the stream to its client."""

    @property
    def full(self) -> bool:
        """Whether the client must read before more is sent."""

    def send(self, data: bytes) -> None:
        """Send this now, or as soon as may be; never waits."""

    async def wait_until_writable(self) -> None:
        """Wait until it is full no longer, or closed."""


class ChunkEncoder(Protocol):
    """What a call has to say, in the bytes of its face."""

    ended: bool
    """Whether the end of the call has been taken."""

    def encode_new(self) -> bytes:
        """All since the last take, empty when there is nothing. Raises the call's error once all before it is taken."""

    def encode_text(self, text: str) -> bytes:
        """A further token's text, when there is nothing else to tell."""

    @property
    def plain(self) -> bool:
        """Whether further tokens can be told by `text`."""


class StreamWriter:
    """One call's way to its client. `run` returns when the call's end is told and raises the call's error."""

    def __init__(self, call: Call, voice: ChunkEncoder, way: Transport, relay: ChunkDelivery) -> None:
        self._call = call
        self._take = voice.encode_new
        self._tell = voice.encode_text
        self._voice = voice
        self._way = way
        self._relay = relay
        self._halted: asyncio.Future[bool] = relay.loop.create_future()
        self._open = True
        self._error: CallError | None = None
        self.marked = False

    async def run(self) -> None:
        """Relay to the end."""
        self._call.listen(self.mark)
        try:
            self.mark()
            while not await self._halted:
                await self._way.wait_until_writable()
                self._halted = self._relay.loop.create_future()
                self._open = True
                self.mark()
        finally:
            self._call.listen(None)
            self._open = False
            for sequence in self._call.sequences:
                sequence.stop_direct()
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
        if not self._open:
            return
        way = self._way
        if way.full:
            self._halt(False)
            return
        try:
            data = self._take()
        except CallError as error:
            self._error = error
            self._halt(True)
            return
        if data:
            way.send(data)
            if self._voice.ended:
                self._halt(True)
                return
        if self._voice.plain:
            self._call.sequences[0].go_direct(self._text)

    def fail(self, error: BaseException) -> None:
        """End the call: writing for it has raised."""
        self._call.fail_unexpectedly(error)
        self._error = self._call.error
        self._halt(True)

    def _text(self, text: str) -> None:
        """A token's text, within the link's pass."""
        way = self._way
        if self._open and not way.full:
            way.send(self._tell(text))
            return
        self._call.sequences[0].give_back(text)
        self.mark()

    def _halt(self, ended: bool) -> None:
        self._open = False
        if not self._halted.done():
            self._halted.set_result(ended)


class ChunkDelivery:
    """The marked lanes of a face."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._marked: deque[StreamWriter] = deque()

    def add(self, lane: StreamWriter) -> None:
        """Write this lane in the next pass."""
        if not self._marked:
            self.loop.call_soon(self._pass)
        self._marked.append(lane)

    def _pass(self) -> None:
        marked = self._marked
        for _ in range(min(LANES_A_PASS, len(marked))):
            lane = marked.popleft()
            try:
                lane.write()
            except BaseException as error:  # its call's end, not the other lanes'
                lane.fail(error)
        if marked:
            self.loop.call_soon(self._pass)
