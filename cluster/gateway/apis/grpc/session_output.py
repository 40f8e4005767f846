"""The output of a session. All output of a tick is sent in one message.

A tick is one pass of the event loop. Its output is everything that one worker message brings, or everything that has
gathered while the client did not read. So a busy session costs one write for each engine step instead of one write for
each token, and a slow client gets fewer and larger messages.
"""

from __future__ import annotations

import asyncio
from typing import Any

from cluster.api.outcomes import CallError
from cluster.gateway.apis.grpc import answers as codec
from cluster.gateway.apis.grpc.answers import text_event
from cluster.gateway.apis.grpc.chunk_encoders import GrpcEncoder, SessionEncoder
from cluster.gateway.apis.grpc.status import details
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.unread_answers import LOGPROB_BYTES, UnreadAnswer
from cluster.v1 import inference_pb2 as pb

MAX_UNREAD_CHARS = 1 << 20
"""Upper bound on the characters and serialized bytes that wait for a client that does not read. A session with more
waiting output is closed."""
MAX_HALTED_S = 60.0
"""Seconds after which a session is closed if the client sends requests but reads nothing. The unread requests fill the
tenant's budget of request bytes."""


class SessionOutput:
    """The output of one session: the serialized events of the next message, and the calls that have more to write."""

    def __init__(self, context: Any, over: asyncio.Future[None], unread: UnreadAnswer) -> None:
        """`over`: a future that ends the session when it gets a result. It gets the result when everything has been
        sent after `finish`, or when the session must be closed because the client does not read. `unread`: counts the
        log probabilities that wait for the client."""
        self._unread_answer = unread
        self._context = context
        self._over = over
        self._loop = asyncio.get_running_loop()
        self._finishing = False
        self._halt: asyncio.Task[None] | None = None
        self.pass_scheduled = False
        self.dirty: dict[int, SessionWriter] = {}
        """Writers of the calls that have output for the next pass, keyed by call id."""
        self.parts: list[bytes] = []
        """Serialized events for the next message, each in one or several parts."""
        self.halted = False
        """Whether output is halted because the client does not read. Each call then keeps and merges its own output."""
        self.client_reads = asyncio.Event()
        """Event that is cleared while output is halted. Until the event is set again, requests of the client are not
        read either."""
        self.client_reads.set()
        self.stalled = False
        """Whether the session must be closed because the client has read nothing for too long, or too much output
        waits."""

    def wake(self) -> None:
        """Schedule the pass that sends the new output. While the client does not read, do nothing."""
        if not self.pass_scheduled and not self.halted:
            self.pass_scheduled = True
            self._context.call_before_flush(self._pass)

    def send_status(self, call_id: int, error: CallError) -> None:
        """Send the error with which a call has ended."""
        self.parts.append(codec.event(pb.SessionEvent(call_id=call_id, status=details(error).SerializeToString())))
        self.wake()

    async def send_whole(self, event: bytes) -> None:
        """Send a serialized event that is not part of a stream, once the client reads. After a large event, also wait
        until the client has read most of it."""
        is_large = len(event) > MAX_UNREAD_CHARS // 4
        while self.halted:
            await self.client_reads.wait()
        self.parts.append(event)
        self.wake()
        if is_large:
            await asyncio.sleep(0)  # for the pass that sends it
            await self.client_reads.wait()

    def finish(self) -> None:
        """Send what is left, then end the session."""
        self._finishing = True
        self.wake()

    async def close(self) -> None:
        """Stop waiting for the client to read."""
        if self._halt is not None:
            self._halt.cancel()
            await asyncio.gather(self._halt, return_exceptions=True)
        self._unread_answer.shrink(0)

    def _pass(self) -> None:
        """Send the next message. The message holds the events that already wait, then at most one event for each call
        with new output."""
        self.pass_scheduled = False
        if self._over.done():
            return
        if self.dirty:
            dirty, self.dirty = self.dirty, {}
            for writer in dirty.values():
                writer.write()
        if self.parts:
            parts, self.parts = self.parts, []
            self._context.send(b"".join(parts))
            if self._context.full:
                self.halted = True
                self.client_reads.clear()
                self._halt = self._loop.create_task(self._await_reader())
        if self._finishing and not self.halted:
            self._over.set_result(None)

    async def _await_reader(self) -> None:
        """Wait until the client reads. Close the session if too much output gathers, or if the client keeps sending
        requests but reads nothing for MAX_HALTED_S."""
        since = self._loop.time()
        while True:
            try:
                async with asyncio.timeout(1.0):
                    await self._context.wait_until_writable()
            except TimeoutError:
                ignored = self._context.unread_requests and self._loop.time() - since > MAX_HALTED_S
                if (ignored or self._is_too_much()) and not self._over.done():
                    self.stalled = True
                    self._over.set_result(None)
                    return
                continue
            self._unread_answer.shrink(0)
            self.halted = False
            self.client_reads.set()
            self.wake()
            return

    def _is_too_much(self) -> bool:
        """Return whether more output waits for the client than may wait."""
        chars = sum(map(len, self.parts)) + sum(writer.pending_chars for writer in self.dirty.values())
        try:
            self._unread_answer.grow(sum(writer.unread_logprobs for writer in self.dirty.values()) * LOGPROB_BYTES)
        except CallError:
            return True
        return chars > MAX_UNREAD_CHARS


class SessionWriter:
    """Writer of one call's events. `run` returns when the end of the call is written, or raises the call's error."""

    __slots__ = (
        "_call",
        "_call_id",
        "_call_output",
        "_encoder",
        "_ended",
        "_event_head",
        "_open",
        "_output",
        "_texts",
    )

    def __init__(self, output: SessionOutput, call_id: int, call: Call, encoder: GrpcEncoder) -> None:
        self._call_id = call_id
        self._output = output
        self._call = call
        self._call_output = call.output
        self._encoder = encoder
        self._event_head = encoder.event_head if isinstance(encoder, SessionEncoder) else None
        self._texts = 0
        """Number of texts that were sent without the encoder."""
        self._open = True
        self._ended = asyncio.Event()

    async def run(self) -> None:
        """Write events until the call ends. Raises the call's error."""
        if self._call.is_resumed:
            self._output.parts.append(self._encoder.begin())
        self._call.output.listen(self._mark)
        self._mark()
        try:
            await self._ended.wait()
        finally:
            self._call.output.listen(None)
            self._output.dirty.pop(self._call_id, None)
        if self._call.error is not None:
            raise self._call.error

    def _mark(self) -> None:
        """Mark the call as having new output, which the next pass writes."""
        output = self._output
        output.dirty[self._call_id] = self
        if not output.pass_scheduled:
            output.wake()

    def _send_text(self, text: str) -> None:
        """Append the text of a token to the next message. Called directly while a message from the worker is
        handled."""
        output = self._output
        if output.halted:
            self._call.sequences[0].give_back(text)
            output.dirty[self._call_id] = self
            return
        if (head := self._event_head) is not None:
            # The encoder is left out: each object that a token needs costs an access to memory (docs/lab/relay.md).
            self._texts += 1
            output.parts.extend(text_event(head, text))
        else:
            output.parts.append(self._encoder.encode_text(text))
        if not output.pass_scheduled:
            output.wake()

    def write(self) -> None:
        """Append all new output of the call to the next message."""
        if not self._open:
            return
        encoder = self._encoder
        if self._texts and isinstance(encoder, SessionEncoder):
            encoder.count_texts(self._texts)
            self._texts = 0
        try:
            if text := self._call_output.pop_text():  # the most frequent case, which needs no `encode_new`
                self._output.parts.append(encoder.encode_text(text))
            elif text is None and (data := encoder.encode_new()):
                self._output.parts.append(data)
            if encoder.ended:
                self._end()
            elif encoder.plain:
                self._call.sequences[0].go_direct(self._send_text)
        except CallError:
            self._end()  # `run` raises the call's error
        except BaseException as error:  # ends this call, not the session
            self._call.fail_unexpectedly(error)
            self._end()

    def _end(self) -> None:
        """Stop writing, and let `run` return."""
        self._open = False
        self._ended.set()

    @property
    def unread_logprobs(self) -> int:
        """Approximate number of log probabilities of the call that are not written to the session yet."""
        return self._call_output.unread_logprobs

    @property
    def pending_chars(self) -> int:
        """Upper bound on the number of characters of the call's text that are not written to the session yet."""
        return sum(sequence.pieces.pending_chars for sequence in self._call.sequences)
