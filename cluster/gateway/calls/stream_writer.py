"""Delivery of chunks from the workers' links to the clients' connections. One callback serves all calls for which a
worker's message brought tokens.

Waking a task for each piece costs about as much as all other Python work for that piece. So a running stream is written
without a task. A token that brings nothing but text goes from the link directly to the connection
(`OutputSequence.direct`). For anything else, the call's listener marks the call's stream writer, and one callback
writes the chunks of all marked writers. When the call has ended or the client reads too slowly, the writer pauses and
the writer's task takes over. Tokens that arrive during a pause are sent afterwards in one larger piece.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from cluster.api.outcomes import CallError
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.unread_answers import LOGPROB_BYTES, UnreadAnswers

MAX_WRITES_A_CALLBACK = 128
"""Number of writes, about a millisecond of work, before other callbacks of the event loop run."""
COUNT_S = 0.25
"""Seconds between two counts of the log probabilities that wait for a client that does not read."""


class Transport(Protocol):
    """The interface that a stream writer uses to send to a client: a connection, or one stream of a connection."""

    @property
    def full(self) -> bool:
        """Whether nothing more may be sent until the client reads."""

    def send(self, data: bytes) -> None:
        """Send or buffer these bytes. Never waits."""

    async def wait_until_writable(self) -> None:
        """Wait until the transport is no longer full or is closed."""


class ChunkEncoder(Protocol):
    """Encoder of a call's chunks into the bytes of the call's API."""

    ended: bool
    """Whether the end of the call has been encoded."""

    def encode_new(self) -> bytes:
        """Encode everything that is new in the call; b"" if nothing is new. If the call has failed, raises the call's
        error once everything before the error has been encoded."""

    def encode_text(self, text: str) -> bytes:
        """Encode the chunk of a token that adds `text` and has nothing else to report."""

    @property
    def plain(self) -> bool:
        """Whether `encode_text` can encode the text of the next tokens."""


class StreamWriter:
    """Writer of one call's chunks to the client. `run` returns when the end of the call has been sent, or raises the
    call's error."""

    __slots__ = ("_call", "_delivery", "_encoder", "_error", "_open", "_paused", "_transport", "marked")

    def __init__(self, call: Call, encoder: ChunkEncoder, transport: Transport, delivery: ChunkDelivery) -> None:
        self._call = call
        self._encoder = encoder
        self._transport = transport
        self._delivery = delivery
        self._paused: asyncio.Future[bool] = delivery.loop.create_future()
        self._open = True
        self._error: CallError | None = None
        self.marked = False

    async def run(self) -> None:
        """Write chunks until the call ends. Raises the call's error."""
        self._call.output.listen(self.mark)
        try:
            self.mark()
            while not await self._paused:
                await self._wait_for_client()
                self._paused = self._delivery.loop.create_future()
                self._open = True
                self.mark()
        finally:
            self._call.output.listen(None)
            self._open = False
            for sequence in self._call.sequences:
                sequence.stop_direct()
            self._paused.cancel()
        if self._error is not None:
            raise self._error

    async def _wait_for_client(self) -> None:
        """Wait until the client reads. Log probabilities that arrive meanwhile take far more memory than text, so they
        count in the budget for answers. Raises CallError if it has no room for them."""
        call = self._call
        if call.sequences[0].logprob_texts is None:
            return await self._transport.wait_until_writable()
        with self._delivery.unread_answers.answer(call.tenant) as unread:
            while True:
                try:
                    async with asyncio.timeout(COUNT_S):
                        return await self._transport.wait_until_writable()
                except TimeoutError:
                    try:
                        unread.grow(call.output.unread_logprobs * LOGPROB_BYTES)
                    except CallError:  # sent only after what waits for the client, and holds the call until then
                        for sequence in call.sequences:
                            sequence.pieces.logprobs = []
                        raise

    def mark(self) -> None:
        """Schedule a call of `write`, because the call has an update."""
        if not self.marked:
            self.marked = True
            self._delivery.add(self)

    def write(self) -> None:
        """Send all chunks that the call has not sent yet. If the client does not read, send nothing and pause until it
        does. After the last chunk, or if the call fails, wake the task that ends the stream."""
        self.marked = False
        if not self._open:
            return
        transport = self._transport
        if transport.full:
            self._pause(False)
            return
        try:
            data = self._encoder.encode_new()
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
        """End the call, because writing the call's chunks raised `error`."""
        self._call.fail_unexpectedly(error)
        self._error = self._call.error
        self._pause(True)

    def _send_text(self, text: str) -> None:
        """Send the text of a token directly. Called while a message from the worker is handled."""
        transport = self._transport
        if self._open and not transport.full:
            transport.send(self._encoder.encode_text(text))
            return
        self._call.sequences[0].give_back(text)
        self.mark()

    def _pause(self, ended: bool) -> None:
        """Stop writing. Afterwards `run` waits until the client has read, or returns if the call has ended."""
        self._open = False
        if not self._paused.done():
            self._paused.set_result(ended)


class ChunkDelivery:
    """Scheduler of the writes of one API: a single callback runs all stream writers that have new output."""

    def __init__(self, unread_answers: UnreadAnswers) -> None:
        self.loop = asyncio.get_running_loop()
        self.unread_answers = unread_answers
        self._marked: deque[StreamWriter] = deque()

    def add(self, writer: StreamWriter) -> None:
        """Queue a writer whose call has something new. A callback of the event loop soon calls `write` of each queued
        writer."""
        if not self._marked:
            self.loop.call_soon(self._write_marked)
        self._marked.append(writer)

    def _write_marked(self) -> None:
        marked = self._marked
        for _ in range(min(MAX_WRITES_A_CALLBACK, len(marked))):
            writer = marked.popleft()
            try:
                writer.write()
            except BaseException as error:  # ends the writer's own call, not the other streams
                writer.fail(error)
        if marked:
            self.loop.call_soon(self._write_marked)
