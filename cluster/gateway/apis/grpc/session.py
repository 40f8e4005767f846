"""Inference.Session: many calls of one client on one stream, all their pieces of a tick in one message.

A tick is one pass of the event loop: all that one message of a worker brings, or all that has gathered while the
client did not read. So a busy session costs one write a step instead of one a token, and a slow one gets larger
messages, never later ones. Each call runs through the same CallService as StreamChat's; only the way out differs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import structlog

from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.gateway.apis.grpc import answers as codec
from cluster.gateway.apis.grpc.chunk_encoders import CHAT, COMPLETE, GrpcEncoder, voice_of
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
"""Requests are taken for so long before the event loop turns to others."""
MAX_UNREAD_CHARS = 1 << 20
"""Characters and serialized bytes that may wait for a client that does not read; beyond it the session is closed."""
MAX_HALTED_S = 60.0
"""A client that reads nothing for so long while it sends requests loses the session: they hold bytes of its tenant."""


class _Open:
    """A call of a session: `call` once it runs; `ended` when its context may close."""

    __slots__ = ("call", "call_id", "ended", "head", "is_chat", "offset", "session", "task", "told", "voice")

    def __init__(self, session: SessionStream, call_id: int, is_chat: bool) -> None:
        self.session = session
        self.call_id = call_id
        self.is_chat = is_chat
        self.head = codec.event_head(call_id)
        self.call: Call | None = None
        self.voice: GrpcEncoder | None = None
        """Of a resumable call: all that it tells are chunks."""
        self.ended = asyncio.Event()
        self.offset = 0
        self.told = False
        self.task: asyncio.Task[None] | None = None

    def mark(self) -> None:
        """The call has news."""
        session = self.session
        session.dirty[self.call_id] = self
        session.wake()

    def text(self, text: str) -> None:
        """A token's text with nothing else to tell, within the link's pass."""
        session = self.session
        if session.halted:
            assert self.call is not None
            self.call.sequences[0].give_back(text)
            session.dirty[self.call_id] = self
            return
        if self.voice is not None:
            self.chunk(self.voice.text(text))
        else:
            self.offset += 1
            session.parts.append(codec.event_text(self.head, text))
        session.wake()

    def chunk(self, data: bytes) -> None:
        """A serialized chunk, with the next message."""
        self.session.parts.append(codec.event_chunk(self.call_id, self.is_chat, data))


class SessionStream:
    """One session. `run` returns when the client has closed its side and every call has ended."""

    def __init__(self, service: CallService, context: Any, visitor: Caller, trace: str, age_s: float) -> None:
        """`visitor`: whose session it is. `trace`: the traceparent of calls that bring none. After `age_s` seconds no
        new call is taken."""
        self._service = service
        self._age_s = age_s
        self._context = context
        self._visitor = visitor
        self._trace = trace
        self.dirty: dict[int, _Open] = {}
        """Calls with news."""
        self.parts: list[bytes] = []
        """Serialized events of the next message."""
        self.halted = False
        """The client does not read: what comes is kept with its call, which joins it."""
        self._calls: dict[int, _Open] = {}
        self._loop = asyncio.get_running_loop()
        self._reading = asyncio.Event()
        self._reading.set()
        """Cleared while the client does not read: then none of its requests is read either."""
        self._awake = False
        self._slice_ends = 0.0
        """When the reader of requests is to turn to others."""
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._drain: asyncio.Task[None] | None = None
        self._half_closed = False
        self._retired = False
        self._unread_for_long = False

    async def run(self) -> None:
        """Serve until the client is done; whatever still runs when it vanishes is ended."""
        reader = asyncio.create_task(self._read())
        reader.add_done_callback(self._read_ended)
        aging = self._loop.call_later(self._age_s, self._retire)
        self._service.on_close.add(self._retire)
        try:
            await self._over  # ends once the client is done and the last call has been told
        finally:
            aging.cancel()
            self._service.on_close.discard(self._retire)
            self._over.cancel()
            tasks = [reader, self._drain, *(o.task for o in self._calls.values())]
            running = [task for task in tasks if task is not None]
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        if self._unread_for_long:
            message = "the session is not read: too much waits for it; read faster, or open more"
            await self._context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message)

    def _read_ended(self, reader: asyncio.Task[None]) -> None:
        error = None if reader.cancelled() else reader.exception()
        if error is not None and not self._over.done():
            self._over.set_exception(error)

    # ---- what the client asks

    async def _read(self) -> None:
        self._slice_ends = self._loop.time() + SLICE_S
        while (request := await self._next_request()) is not None:
            try:
                found = await self._service.bodies.session(request, self._tenant())
                for one in session_items(found) if isinstance(found, pb.SessionRequest) else found:
                    if isinstance(one, SessionStart):
                        self._start(one)
                    else:
                        self._cancel(one.call_id)
                    await self._turn_to_others()
            except CallError as error:
                await self._context.abort(grpc_code(error), error.message, trailers(error))
            await self._turn_to_others()  # also behind messages without a request
        self._half_closed = True
        self.wake()

    async def _turn_to_others(self) -> None:
        """Let the event loop go on once a slice is over; in it a client that does not read is noticed."""
        if self._loop.time() >= self._slice_ends:
            await asyncio.sleep(0)
            await self._reading.wait()
            self._slice_ends = self._loop.time() + SLICE_S

    async def _next_request(self) -> Any:
        """The client's next message once it reads, None at its end."""
        await self._reading.wait()
        return await read(self._context)

    def _retire(self) -> None:
        """Take no new call; the stream ends with the last one. The client opens another meanwhile."""
        self._retired = True
        self.wake()

    def _start(self, start: SessionStart) -> None:
        call_id = start.call_id
        if call_id in self._calls:
            self._refuse(call_id, invalid("call_id", f"{call_id} is running already in this session"))
            return
        if self._retired:
            message = "this session takes no more calls: open another"
            self._refuse(call_id, CallError(Outcome.NO_WORKER, message, retry_after_s=0.0))
            return
        if len(self._calls) >= MAX_CALLS:
            message = f"a session holds at most {MAX_CALLS} calls; open another"
            self._refuse(call_id, CallError(Outcome.QUEUE_FULL, message))
            return
        try:
            meta = self._call_meta(start)
        except CallError as error:
            self._refuse(call_id, error)
            return
        opened = self._calls[call_id] = _Open(self, call_id, start.is_chat)
        opened.task = asyncio.create_task(self._run(opened, start.wish, meta, start.deadline_ms / 1000))
        opened.task.add_done_callback(lambda _: self._never_ran(opened))

    def _tenant(self) -> str:
        """Whose session it is; empty once it may no longer call."""
        return "" if self._visitor.refused is not None else self._visitor.principal.tenant.name

    def _call_meta(self, start: SessionStart) -> CallMeta:
        """Raises CallError once the session's caller may no longer call."""
        principal = self._visitor.require()
        deadline = self._service.clock() + start.deadline_ms / 1000 if start.deadline_ms else None
        own_id = start.request_id or random_id()
        return CallMeta(own_id, "grpc", deadline, start.traceparent or self._trace, principal)

    def _refuse(self, call_id: int, error: CallError) -> None:
        self._tell(pb.SessionEvent(call_id=call_id, status=details(error).SerializeToString()))
        self.wake()

    def _tell(self, event: pb.SessionEvent) -> None:
        self.parts.append(codec.event(event))

    def _cancel(self, call_id: int) -> None:
        opened = self._calls.get(call_id)
        if opened is not None and opened.task is not None:
            opened.task.cancel()

    async def _run(self, opened: _Open, wish: GenerationRequest | CallError, meta: CallMeta, deadline_s: float) -> None:
        """One call, from its start to its end; its pieces go out through the writer."""
        try:
            meta = await self._service.count(meta)
            if isinstance(wish, CallError):
                raise wish
            async with asyncio.timeout(deadline_s or None), self._service.open(wish, meta) as call:
                opened.call = call
                if call.resume_tokens is not None:
                    opened.voice = voice_of(CHAT if opened.is_chat else COMPLETE, call, self._service, bare=True)
                    if call.continues:
                        opened.chunk(opened.voice.begin())
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
        except Exception:  # it ends this call, not the session and its other calls
            log.exception("unexpected", request_id=meta.request_id)
            message = f"unexpected failure; quote request id {meta.request_id}"
            self._end(opened, CallError(Outcome.INTERNAL, message))
        else:
            self._end(opened, None)

    def _never_ran(self, opened: _Open) -> None:
        """A task that is cancelled before its first step, since its cancel came with its start, does nothing at all."""
        if self._calls.get(opened.call_id) is opened:
            self._end(opened, CallError(Outcome.CANCELLED, "cancelled by the client"))

    def _end(self, opened: _Open, error: CallError | None) -> None:
        if self._calls.get(opened.call_id) is opened:
            del self._calls[opened.call_id]
        if self.dirty.get(opened.call_id) is opened:
            del self.dirty[opened.call_id]
        if error is not None:
            self._refuse(opened.call_id, error)
        self.wake()

    # ---- what the client gets

    def wake(self) -> None:
        """There is something to write, or the end may have come: look in the next pass."""
        if not self._awake and not self.halted:
            self._awake = True
            self._loop.call_soon(self._pass)

    def _pass(self) -> None:
        self._awake = False
        if self._over.done():
            return
        self._gather()
        if self.parts:
            parts, self.parts = self.parts, []
            self._context.send(b"".join(parts))
            if self._context.full:
                self.halted = True
                self._reading.clear()
                self._drain = self._loop.create_task(self._until_read())
        # Also after what was sent just now: nobody wakes a session whose client has ended it with its last request.
        if (self._half_closed or self._retired) and not self._calls and not self.halted:
            self._over.set_result(None)

    async def _until_read(self) -> None:
        """A client that lets too much gather loses the session, not the gateway its memory."""
        since = self._loop.time()
        while True:
            try:
                async with asyncio.timeout(1.0):
                    await self._context.drained()
            except TimeoutError:
                ignored = self._context.unread_requests and self._loop.time() - since > MAX_HALTED_S
                if (ignored or self._unread() > MAX_UNREAD_CHARS) and not self._over.done():
                    self._unread_for_long = True
                    self._over.set_result(None)
                    return
                continue
            self.halted = False
            self._reading.set()
            self.wake()
            return

    def _unread(self) -> int:
        calls = (o.call for o in self.dirty.values() if o.call is not None)
        return sum(map(len, self.parts)) + sum(output.untaken for call in calls for output in call.sequences)

    def _gather(self) -> None:
        """The news of all marked calls, behind what came direct, at most one event a call."""
        if not self.dirty:
            return
        dirty, self.dirty = self.dirty, {}
        for opened in dirty.values():
            call = opened.call
            if call is None or opened.told:
                continue
            try:
                self._news(opened, call)
            except BaseException as error:  # its call's end, not the session's
                call.fail_unexpectedly(error)
                opened.told = True
                opened.ended.set()

    def _sealed_news(self, opened: _Open, call: Call, voice: GrpcEncoder) -> None:
        try:
            data = voice.take()
        except CallError:
            opened.told = True
            opened.ended.set()
            return
        if data:
            opened.chunk(data)
        if voice.ended:
            opened.told = True
            opened.ended.set()
        elif voice.plain:
            call.sequences[0].go_direct(opened.text)

    def _news(self, opened: _Open, call: Call) -> None:
        if opened.voice is not None:
            self._sealed_news(opened, call, opened.voice)
            return
        text = call.take_text()
        if text is None:
            try:
                pieces = call.take()
            except CallError:
                opened.told = True
                opened.ended.set()  # `_run` raises the call's error and tells it
                return
            if pieces:
                self._chunk(opened, call, pieces)
            else:
                self._silent(opened, call)
        elif text:
            opened.offset += 1
            self.parts.append(codec.event_text(opened.head, text))
        if len(call.sequences) == 1 and not opened.told:
            call.sequences[0].go_direct(opened.text)

    def _chunk(self, opened: _Open, call: Call, pieces: Sequence[Piece]) -> None:
        opened.offset += 1
        if call.told:
            opened.told = True
            opened.ended.set()
        if opened.is_chat:
            chat = codec.chat_chunk(call, pieces, opened.offset)
            self._tell(pb.SessionEvent(call_id=opened.call_id, chat=chat))
        else:
            complete = codec.complete_chunk(call, pieces, opened.offset)
            self._tell(pb.SessionEvent(call_id=opened.call_id, complete=complete))

    def _silent(self, opened: _Open, call: Call) -> None:
        if not call.silent:
            return
        call.silent = False
        progress = codec.progress_pb(self._service.progress(call))
        if opened.is_chat:
            chat = pb.ChatChunk(id=call.shown_id, model=call.model, progress=progress)
            self._tell(pb.SessionEvent(call_id=opened.call_id, chat=chat))
        else:
            complete = pb.CompleteChunk(id=call.shown_id, model=call.model, progress=progress)
            self._tell(pb.SessionEvent(call_id=opened.call_id, complete=complete))
