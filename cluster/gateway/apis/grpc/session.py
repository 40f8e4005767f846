"""Inference.SessionStream: many calls of one client on one stream. All output of a tick is sent in one message.

A tick is one pass of the event loop. The output of a tick is everything that one worker message brings, or everything
that has gathered while the client did not read. A busy session thus costs one write for each engine step instead of
one write for each token, and a slow client gets larger messages instead of later messages. Calls of a session run
through the same CallService as calls of StreamChat; only the output differs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import structlog

from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.gateway.apis.grpc import answers as codec
from cluster.gateway.apis.grpc.chunk_encoders import CHAT, COMPLETE, GrpcEncoder, encoder_for
from cluster.gateway.apis.grpc.requests import SessionStart, session_items
from cluster.gateway.apis.grpc.status import details, grpc_code, trailers
from cluster.gateway.apis.request_ids import random_id
from cluster.gateway.auth.authenticator import Caller
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.meta import CallMeta
from cluster.gateway.calls.request import GenerationRequest
from cluster.gateway.calls.sequence import Piece
from cluster.gateway.service import CallService
from cluster.v1 import inference_pb2 as pb
from cluster.wire.dial import read

log = structlog.get_logger("session")

MAX_CALLS = 10_000
SLICE_S = 0.001
"""Longest time in seconds for which requests are read before the event loop runs other tasks."""
MAX_UNREAD_CHARS = 1 << 20
"""Upper bound on the characters and serialized bytes that wait for a client that does not read. A session with more
waiting output is closed."""
MAX_HALTED_S = 60.0
"""Seconds after which a session is closed if the client sends requests but reads nothing. The unread requests fill the
tenant's budget of request bytes."""


class _SessionCall:
    """A call of a session. `call` is set once the call runs. `ended` is set once the call's context may close."""

    __slots__ = ("call", "call_id", "encoder", "end_written", "ended", "head", "is_chat", "offset", "session", "task")

    def __init__(self, session: SessionStream, call_id: int, is_chat: bool) -> None:
        self.session = session
        self.call_id = call_id
        self.is_chat = is_chat
        self.head = codec.event_head(call_id)
        self.call: Call | None = None
        self.encoder: GrpcEncoder | None = None
        """The chunk encoder of a resumable call, all of whose events are chunks; None for other calls."""
        self.ended = asyncio.Event()
        self.offset = 0
        self.end_written = False
        self.task: asyncio.Task[None] | None = None

    def mark(self) -> None:
        """Mark this call as having output for the next pass."""
        session = self.session
        session.dirty[self.call_id] = self
        session.wake()

    def text(self, text: str) -> None:
        """Append the text of a token to the next message. Called directly while a worker's message is handled."""
        session = self.session
        if session.halted:
            assert self.call is not None
            self.call.sequences[0].give_back(text)
            session.dirty[self.call_id] = self
            return
        if self.encoder is not None:
            self.chunk(self.encoder.encode_text(text))
        else:
            self.offset += 1
            session.parts.append(codec.event_text(self.head, text))
        session.wake()

    def chunk(self, data: bytes) -> None:
        """Append a serialized chunk to the next message."""
        self.session.parts.append(codec.event_chunk(self.call_id, self.is_chat, data))


class SessionStream:
    """A session. `run` returns when the client has closed its side of the stream and every call has ended."""

    def __init__(self, service: CallService, context: Any, caller: Caller, trace: str, age_s: float) -> None:
        """`caller`: the owner of the session. `trace`: the traceparent for calls that bring no traceparent. `age_s`:
        seconds after which the session accepts no new calls."""
        self._service = service
        self._age_s = age_s
        self._context = context
        self._caller = caller
        self._trace = trace
        self.dirty: dict[int, _SessionCall] = {}
        """Calls that have output for the next pass, by call id."""
        self.parts: list[bytes] = []
        """Serialized events for the next message."""
        self.halted = False
        """Whether output is halted because the client does not read. Each call then keeps and merges its own output."""
        self._calls: dict[int, _SessionCall] = {}
        self._loop = asyncio.get_running_loop()
        self._reading = asyncio.Event()
        self._reading.set()
        """Event that is cleared while the client does not read. Until the event is set again, requests of the client
        are not read either."""
        self._pass_scheduled = False
        self._slice_ends = 0.0
        """Time of the event loop's clock at which the reader of requests must yield to the event loop."""
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._drain: asyncio.Task[None] | None = None
        self._half_closed = False
        self._retired = False
        self._stalled = False

    async def run(self) -> None:
        """Serve the session until the client is done. If the client disconnects, the running calls are cancelled."""
        reader = asyncio.create_task(self._read())
        reader.add_done_callback(self._read_ended)
        aging = self._loop.call_later(self._age_s, self._retire)
        self._service.calls.on_close.add(self._retire)
        try:
            await self._over  # set once the client is done and the last call's end is sent
        finally:
            aging.cancel()
            self._service.calls.on_close.discard(self._retire)
            self._over.cancel()
            tasks = [reader, self._drain, *(o.task for o in self._calls.values())]
            running = [task for task in tasks if task is not None]
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        if self._stalled:
            message = (
                "the client does not read the session and too much output waits: read faster, or open more sessions"
            )
            await self._context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message)

    def _read_ended(self, reader: asyncio.Task[None]) -> None:
        error = None if reader.cancelled() else reader.exception()
        if error is not None and not self._over.done():
            self._over.set_exception(error)

    # ---- requests

    async def _read(self) -> None:
        self._slice_ends = self._loop.time() + SLICE_S
        while (request := await self._next_request()) is not None:
            try:
                decoded = await self._service.bodies.session(request, self._tenant())
                for item in session_items(decoded) if isinstance(decoded, pb.SessionRequest) else decoded:
                    if isinstance(item, SessionStart):
                        self._start(item)
                    else:
                        self._cancel(item.call_id)
                    await self._yield_after_slice()
            except CallError as error:
                await self._context.abort(grpc_code(error), error.message, trailers(error))
            await self._yield_after_slice()  # also after messages without a request
        self._half_closed = True
        self.wake()

    async def _yield_after_slice(self) -> None:
        """Yield to the event loop once a time slice is over, and wait while the client does not read."""
        if self._loop.time() >= self._slice_ends:
            await asyncio.sleep(0)
            await self._reading.wait()
            self._slice_ends = self._loop.time() + SLICE_S

    async def _next_request(self) -> Any:
        """Wait until the client reads, then return the client's next message; None at the end of the stream."""
        await self._reading.wait()
        return await read(self._context)

    def _retire(self) -> None:
        """Stop accepting new calls. The stream ends after the last running call; the client opens another session for
        new calls."""
        self._retired = True
        self.wake()

    def _start(self, start: SessionStart) -> None:
        call_id = start.call_id
        if call_id in self._calls:
            self._refuse(call_id, invalid("call_id", f"{call_id} is already running in this session; use another id"))
            return
        if self._retired:
            message = "this session takes no more calls: open another session"
            self._refuse(call_id, CallError(Outcome.NO_WORKER, message, retry_after_s=0.0))
            return
        if len(self._calls) >= MAX_CALLS:
            message = f"a session holds at most {MAX_CALLS} calls; open another session"
            self._refuse(call_id, CallError(Outcome.QUEUE_FULL, message))
            return
        try:
            meta = self._call_meta(start)
        except CallError as error:
            self._refuse(call_id, error)
            return
        opened = self._calls[call_id] = _SessionCall(self, call_id, start.is_chat)
        opened.task = asyncio.create_task(self._run(opened, start.request, meta, start.deadline_ms / 1000))
        opened.task.add_done_callback(lambda _: self._end_unstarted(opened))

    def _tenant(self) -> str:
        """Return the tenant of the session; "" once the caller is no longer allowed to make calls."""
        return "" if self._caller.refused is not None else self._caller.principal.tenant.name

    def _call_meta(self, start: SessionStart) -> CallMeta:
        """Return the metadata of a call. Raises CallError once the caller is no longer allowed to make calls."""
        principal = self._caller.require()
        deadline = self._service.clock() + start.deadline_ms / 1000 if start.deadline_ms else None
        own_id = start.request_id or random_id()
        return CallMeta(own_id, "grpc", deadline, start.traceparent or self._trace, principal)

    def _refuse(self, call_id: int, error: CallError) -> None:
        self._append_event(pb.SessionEvent(call_id=call_id, status=details(error).SerializeToString()))
        self.wake()

    def _append_event(self, event: pb.SessionEvent) -> None:
        self.parts.append(codec.event(event))

    def _cancel(self, call_id: int) -> None:
        opened = self._calls.get(call_id)
        if opened is not None and opened.task is not None:
            opened.task.cancel()

    async def _run(
        self, opened: _SessionCall, request: GenerationRequest | CallError, meta: CallMeta, deadline_s: float
    ) -> None:
        """Run one call to its end. `_pass` writes the output of the call."""
        try:
            meta = await self._service.count(meta)
            if isinstance(request, CallError):
                raise request
            async with asyncio.timeout(deadline_s or None), self._service.open(request, meta) as call:
                opened.call = call
                if call.resume_tokens is not None:
                    opened.encoder = encoder_for(
                        CHAT if opened.is_chat else COMPLETE, call, self._service, unwrapped=True
                    )
                    if call.is_resumed:
                        opened.chunk(opened.encoder.begin())
                call.listen(opened.mark)
                opened.mark()
                await opened.ended.wait()
                if call.error is not None:
                    raise call.error
        except CallError as error:
            self._end(opened, error)
        except TimeoutError:
            self._end(opened, CallError(Outcome.DEADLINE_EXCEEDED, "the call's deadline_ms has passed"))
        except asyncio.CancelledError:
            self._end(opened, CallError(Outcome.CANCELLED, "cancelled by the client"))
            raise
        except Exception:  # ends this call, not the session
            log.exception("unexpected", request_id=meta.request_id)
            message = f"unexpected failure; quote request id {meta.request_id}"
            self._end(opened, CallError(Outcome.INTERNAL, message))
        else:
            self._end(opened, None)

    def _end_unstarted(self, opened: _SessionCall) -> None:
        """End a call whose task was cancelled before the first step of the task. That happens if the client sends the
        cancel together with the start."""
        if self._calls.get(opened.call_id) is opened:
            self._end(opened, CallError(Outcome.CANCELLED, "cancelled by the client"))

    def _end(self, opened: _SessionCall, error: CallError | None) -> None:
        if self._calls.get(opened.call_id) is opened:
            del self._calls[opened.call_id]
        if self.dirty.get(opened.call_id) is opened:
            del self.dirty[opened.call_id]
        if error is not None:
            self._refuse(opened.call_id, error)
        self.wake()

    # ---- output

    def wake(self) -> None:
        """Schedule a pass, because there is output or the session may have ended."""
        if not self._pass_scheduled and not self.halted:
            self._pass_scheduled = True
            self._loop.call_soon(self._pass)

    def _pass(self) -> None:
        self._pass_scheduled = False
        if self._over.done():
            return
        self._gather()
        if self.parts:
            parts, self.parts = self.parts, []
            self._context.send(b"".join(parts))
            if self._context.full:
                self.halted = True
                self._reading.clear()
                self._drain = self._loop.create_task(self._await_reader())
        # This check also follows a send: if the client closed its side with the last request, nothing else wakes the
        # session.
        if (self._half_closed or self._retired) and not self._calls and not self.halted:
            self._over.set_result(None)

    async def _await_reader(self) -> None:
        """Wait until the client reads. Close the session if the client lets too much output gather."""
        since = self._loop.time()
        while True:
            try:
                async with asyncio.timeout(1.0):
                    await self._context.wait_until_writable()
            except TimeoutError:
                ignored = self._context.unread_requests and self._loop.time() - since > MAX_HALTED_S
                if (ignored or self._unread() > MAX_UNREAD_CHARS) and not self._over.done():
                    self._stalled = True
                    self._over.set_result(None)
                    return
                continue
            self.halted = False
            self._reading.set()
            self.wake()
            return

    def _unread(self) -> int:
        calls = (o.call for o in self.dirty.values() if o.call is not None)
        return sum(map(len, self.parts)) + sum(sequence.pending_chars for call in calls for sequence in call.sequences)

    def _gather(self) -> None:
        """Append the output of all marked calls to the next message, at most one event for each call. Events that were
        appended directly stay first."""
        if not self.dirty:
            return
        dirty, self.dirty = self.dirty, {}
        for opened in dirty.values():
            call = opened.call
            if call is None or opened.end_written:
                continue
            try:
                self._write_news(opened, call)
            except BaseException as error:  # ends this call, not the session
                call.fail_unexpectedly(error)
                opened.end_written = True
                opened.ended.set()

    def _write_resumable(self, opened: _SessionCall, call: Call, encoder: GrpcEncoder) -> None:
        try:
            data = encoder.encode_new()
        except CallError:
            opened.end_written = True
            opened.ended.set()
            return
        if data:
            opened.chunk(data)
        if encoder.ended:
            opened.end_written = True
            opened.ended.set()
        elif encoder.plain:
            call.sequences[0].go_direct(opened.text)

    def _write_news(self, opened: _SessionCall, call: Call) -> None:
        if opened.encoder is not None:
            self._write_resumable(opened, call, opened.encoder)
            return
        text = call.pop_text()
        if text is None:
            try:
                pieces = call.pop_pieces()
            except CallError:
                opened.end_written = True
                opened.ended.set()  # `_run` raises the call's error and sends it
                return
            if pieces:
                self._write_chunk(opened, call, pieces)
            else:
                self._write_progress(opened, call)
        elif text:
            opened.offset += 1
            self.parts.append(codec.event_text(opened.head, text))
        if len(call.sequences) == 1 and not opened.end_written:
            call.sequences[0].go_direct(opened.text)

    def _write_chunk(self, opened: _SessionCall, call: Call, pieces: Sequence[Piece]) -> None:
        opened.offset += 1
        if call.end_delivered:
            opened.end_written = True
            opened.ended.set()
        if opened.is_chat:
            chat = codec.chat_chunk(call, pieces, opened.offset)
            self._append_event(pb.SessionEvent(call_id=opened.call_id, chat=chat))
        else:
            complete = codec.complete_chunk(call, pieces, opened.offset)
            self._append_event(pb.SessionEvent(call_id=opened.call_id, complete=complete))

    def _write_progress(self, opened: _SessionCall, call: Call) -> None:
        if not call.silent:
            return
        call.silent = False
        progress = codec.progress_pb(self._service.keepalives.progress(call))
        if opened.is_chat:
            chat = pb.ChatChunk(id=call.shown_id, model=call.model, progress=progress)
            self._append_event(pb.SessionEvent(call_id=opened.call_id, chat=chat))
        else:
            complete = pb.CompleteChunk(id=call.shown_id, model=call.model, progress=progress)
            self._append_event(pb.SessionEvent(call_id=opened.call_id, complete=complete))
