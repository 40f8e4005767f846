"""Delivery of chunks from links to client connections, for all calls of a worker's message in one callback.

Waking a task for each piece costs about as much as all other Python work for that piece. So a running stream is written
without a task. A token that brings nothing but text goes from the link directly to its connection
(`OutputSequence.direct`). For anything else, the call's listener marks its stream writer, and one callback writes the
chunks of all marked writers. A writer pauses, and its task takes over, when its call has ended or its client reads too
slowly; tokens that arrive meanwhile are sent afterwards in one larger piece.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from cluster.api.outcomes import CallError
from cluster.gateway.calls.call import Call

MAX_WRITES_A_CALLBACK = 128
"""About a millisecond of writes, before other callbacks of the event loop run."""


class Transport(Protocol):
    """A client's connection, or one stream of it, as a stream writer needs it."""

    @property
    def full(self) -> bool:
        """Whether nothing more may be sent until the client reads."""

    def send(self, data: bytes) -> None:
        """Send or buffer these bytes; never waits."""

    async def wait_until_writable(self) -> None:
        """Wait until the transport is no longer full, or is closed."""


class ChunkEncoder(Protocol):
    """Encoder of a call's chunks in the bytes of its API."""

    ended: bool
    """Whether the end of the call has been encoded."""

    def encode_new(self) -> bytes:
        """Encode all that is new, empty if nothing is. Raises the call's error once all before it was encoded."""

    def encode_text(self, text: str) -> bytes:
        """Encode a further token that brings nothing but text."""

    @property
    def plain(self) -> bool:
        """Whether further tokens can be encoded by `encode_text`."""


class StreamWriter:
    """Writer of one call's chunks to its client. `run` returns when the call's end is sent; raises the call's error."""

    def __init__(self, call: Call, encoder: ChunkEncoder, transport: Transport, delivery: ChunkDelivery) -> None:
        self._call = call
        self._encode_new = encoder.encode_new
        self._encode_text = encoder.encode_text
        self._encoder = encoder
        self._transport = transport
        self._delivery = delivery
        self._paused: asyncio.Future[bool] = delivery.loop.create_future()
        self._open = True
        self._error: CallError | None = None
        self.marked = False

    async def run(self) -> None:
        """Write chunks until the call ends."""
        self._call.listen(self.mark)
        try:
            self.mark()
            while not await self._paused:
                await self._transport.wait_until_writable()
                self._paused = self._delivery.loop.create_future()
                self._open = True
                self.mark()
        finally:
            self._call.listen(None)
            self._open = False
            for sequence in self._call.sequences:
                sequence.stop_direct()
            self._paused.cancel()
        if self._error is not None:
            raise self._error

    def mark(self) -> None:
        """Schedule a write: the call has an update."""
        if not self.marked:
            self.marked = True
            self._delivery.add(self)

    def write(self) -> None:
        """Send all that is new, or pause."""
        self.marked = False
        if not self._open:
            return
        transport = self._transport
        if transport.full:
            self._pause(False)
            return
        try:
            data = self._encode_new()
        except CallError as error:
            self._error = error
            self._pause(True)
            return
        if data:
            transport.send(data)
            if self._encoder.ended:
                self._pause(True)
                return
        if self._encoder.plain:
            self._call.sequences[0].go_direct(self._send_text)

    def fail(self, error: BaseException) -> None:
        """End the call: writing for it raised `error`."""
        self._call.fail_unexpectedly(error)
        self._error = self._call.error
        self._pause(True)

    def _send_text(self, text: str) -> None:
        """Send a token's text directly; called by the link's reader."""
        transport = self._transport
        if self._open and not transport.full:
            transport.send(self._encode_text(text))
            return
        self._call.sequences[0].give_back(text)
        self.mark()

    def _pause(self, ended: bool) -> None:
        """Stop writing; `run` continues once the client has read, or returns if the call has ended."""
        self._open = False
        if not self._paused.done():
            self._paused.set_result(ended)


class ChunkDelivery:
    """Writes the marked stream writers of one API."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._marked: deque[StreamWriter] = deque()

    def add(self, writer: StreamWriter) -> None:
        """Write this stream in the next callback."""
        if not self._marked:
            self.loop.call_soon(self._write_marked)
        self._marked.append(writer)

    def _write_marked(self) -> None:
        marked = self._marked
        for _ in range(min(MAX_WRITES_A_CALLBACK, len(marked))):
            writer = marked.popleft()
            try:
                writer.write()
            except BaseException as error:  # ends its own call, not the other streams
                writer.fail(error)
        if marked:
            self.loop.call_soon(self._write_marked)
