"""Inference.Session: many calls of one client on one stream, all their pieces of a tick in one message.

A tick is one pass of the session's writer: all that has gathered while the last message was being written. So a busy
session costs one write a step instead of one a token, and a slow one gets larger messages, never later ones. Each
call runs through the same CallService as StreamChat's; only the way out differs.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

import grpc
import structlog

from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.gateway import grpc_codec as codec
from cluster.gateway.call import Call
from cluster.gateway.service import CallMeta, CallService
from cluster.gateway.status import details
from cluster.gateway.wishes import Wish
from cluster.link.dial import read
from cluster.v1 import inference_pb2 as pb

log = structlog.get_logger("session")

MAX_CALLS = 10_000
MAX_UNREAD_TOKENS = 262_144
"""Tokens that may wait for a client that does not read; beyond it the session is closed."""


class _Open:
    """A call of a session: `call` once it runs; `ended` when its context may close."""

    def __init__(self, call_id: int, is_chat: bool) -> None:
        self.call_id = call_id
        self.is_chat = is_chat
        self.call: Call | None = None
        self.ended = asyncio.Event()
        self.offset = 0
        self.told = False
        self.task: asyncio.Task[None] | None = None


class Session:
    """One session. `run` returns when the client has closed its side and every call has ended."""

    def __init__(self, service: CallService, context: Any, meta: Callable[[], CallMeta], age_s: float) -> None:
        """`meta` reads the stream's own metadata; after `age_s` seconds no new call is taken."""
        self._service = service
        self._age_s = age_s
        self._context = context
        self._meta = meta
        self._calls: dict[int, _Open] = {}
        self._dirty: dict[int, _Open] = {}
        self._extra: list[pb.SessionEvent] = []
        self._wake = asyncio.Event()
        self._half_closed = False
        self._retired = False

    async def run(self) -> None:
        """Serve until the client is done; whatever still runs when it vanishes is ended."""
        reader = asyncio.create_task(self._read())
        writer = asyncio.create_task(self._write())
        aging = asyncio.get_running_loop().call_later(self._age_s, self._retire)
        self._service.on_close.add(self._retire)
        try:
            done, _ = await asyncio.wait([reader, writer], return_when=asyncio.FIRST_COMPLETED)
            if reader in done:
                reader.result()
                await writer  # ends by itself once the last call has been told
            writer.result()
        finally:
            aging.cancel()
            self._service.on_close.discard(self._retire)
            tasks = [reader, writer, *(o.task for o in self._calls.values() if o.task is not None)]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # ---- what the client asks

    async def _read(self) -> None:
        while (request := await read(self._context)) is not None:
            if not isinstance(request, pb.SessionRequest):
                await self._context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not a SessionRequest: {request.why}")
            if request.HasField("start"):
                self._start(request.start)
            elif request.HasField("cancel"):
                self._cancel(request.cancel.call_id)
        self._half_closed = True
        self._wake.set()

    def _retire(self) -> None:
        """Take no new call; the stream ends with the last one. The client opens another meanwhile."""
        self._retired = True
        self._wake.set()

    def _start(self, start: pb.SessionStart) -> None:
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
        kind = start.WhichOneof("call")
        try:
            if kind is None:
                raise invalid("start", "must hold chat or complete")
            wish = codec.chat_wish(start.chat) if kind == "chat" else codec.complete_wish(start.complete)
        except CallError as error:
            self._refuse(call_id, error)
            return
        opened = self._calls[call_id] = _Open(call_id, kind == "chat")
        opened.task = asyncio.create_task(self._run(opened, wish, self._call_meta(start), start.deadline_ms / 1000))

    def _call_meta(self, start: pb.SessionStart) -> CallMeta:
        base = self._meta()
        deadline = self._service.clock() + start.deadline_ms / 1000 if start.deadline_ms else None
        request_id = start.request_id or uuid.uuid4().hex
        return CallMeta(request_id, base.face, deadline, start.traceparent or base.traceparent, base.tenant)

    def _refuse(self, call_id: int, error: CallError) -> None:
        self._extra.append(pb.SessionEvent(call_id=call_id, status=details(error).SerializeToString()))
        self._wake.set()

    def _cancel(self, call_id: int) -> None:
        opened = self._calls.get(call_id)
        if opened is not None and opened.task is not None:
            opened.task.cancel()

    async def _run(self, opened: _Open, wish: Wish, meta: CallMeta, deadline_s: float) -> None:
        """One call, from its start to its end; its pieces go out through the writer."""
        try:
            async with asyncio.timeout(deadline_s or None), self._service.open(wish, meta) as call:
                opened.call = call
                call.listener = lambda: self._mark(opened)
                call.listener()
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

    def _mark(self, opened: _Open) -> None:
        self._dirty[opened.call_id] = opened
        self._wake.set()

    def _end(self, opened: _Open, error: CallError | None) -> None:
        if self._calls.get(opened.call_id) is opened:
            del self._calls[opened.call_id]
        self._dirty.pop(opened.call_id, None)
        if error is not None:
            self._refuse(opened.call_id, error)
        self._wake.set()

    # ---- what the client gets

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            events = self._events()
            if events:
                await self._send(pb.SessionEvents(events=events))
            elif (self._half_closed or self._retired) and not self._calls and not self._extra:
                return

    async def _send(self, message: pb.SessionEvents) -> None:
        """Write; a client that lets too much gather meanwhile loses the session, not the gateway its memory."""
        write = asyncio.ensure_future(self._context.write(message))
        while not write.done():
            await asyncio.wait([write], timeout=1.0)
            if not write.done() and self._unread() > MAX_UNREAD_TOKENS:
                write.cancel()
                message_text = f"the session is not read: {MAX_UNREAD_TOKENS} tokens wait; read faster, or open more"
                await self._context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message_text)
        write.result()

    def _unread(self) -> int:
        calls = (o.call for o in self._dirty.values() if o.call is not None)
        return sum(len(output.emitted) - output.taken for call in calls for output in call.sequences)

    def _events(self) -> list[pb.SessionEvent]:
        """All that has gathered: at most one event a call, and the ends of calls."""
        dirty, self._dirty = self._dirty, {}
        events, self._extra = self._extra, []
        for opened in dirty.values():
            call = opened.call
            if call is None or opened.told:
                continue
            event = self._event(opened, call)
            if event is not None:
                events.append(event)
        return events

    def _event(self, opened: _Open, call: Call) -> pb.SessionEvent | None:
        if (text := call.take_text()) is not None:
            opened.offset += bool(text)
            return pb.SessionEvent(call_id=opened.call_id, text=text) if text else None
        try:
            pieces = call.take()
        except CallError:
            opened.told = True
            opened.ended.set()  # `_run` raises the call's error and tells it
            return None
        if not pieces:
            return self._silent(opened, call)
        opened.offset += 1
        if call.told:
            opened.told = True
            opened.ended.set()
        if opened.is_chat:
            return pb.SessionEvent(call_id=opened.call_id, chat=codec.chat_chunk(call, pieces, opened.offset))
        return pb.SessionEvent(call_id=opened.call_id, complete=codec.complete_chunk(call, pieces, opened.offset))

    def _silent(self, opened: _Open, call: Call) -> pb.SessionEvent | None:
        if not call.silent:
            return None
        call.silent = False
        progress = codec.progress_pb(self._service.progress(call))
        if opened.is_chat:
            chunk = pb.ChatChunk(id=call.id, model=call.model, progress=progress)
            return pb.SessionEvent(call_id=opened.call_id, chat=chunk)
        return pb.SessionEvent(
            call_id=opened.call_id, complete=pb.CompleteChunk(id=call.id, model=call.model, progress=progress)
        )
