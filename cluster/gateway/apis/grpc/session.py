"""Inference.SessionStream: many calls of one client on one stream.

The same CallService runs the calls of sessions and the calls of StreamChat. Only the output differs
(session_output.py).
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import structlog

from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.gateway.apis.grpc.answers import event_answer
from cluster.gateway.apis.grpc.chunk_encoders import CHAT, COMPLETE, session_encoder_for
from cluster.gateway.apis.grpc.pooling import pooling_response
from cluster.gateway.apis.grpc.requests import SessionStart, session_items
from cluster.gateway.apis.grpc.session_output import SessionOutput, SessionWriter
from cluster.gateway.apis.grpc.shared_body import SharedBody
from cluster.gateway.apis.grpc.status import grpc_code, trailers
from cluster.gateway.apis.request_ids import random_id
from cluster.gateway.auth.authenticator import Caller
from cluster.gateway.call_service import CallService
from cluster.gateway.calls.meta import CallMeta
from cluster.gateway.calls.pooling.pooling_request import PairInputs, ParsedPooling
from cluster.gateway.calls.request import GenerationRequest
from cluster.observe.log import CallFields
from cluster.v1 import inference_pb2 as pb
from cluster.wire.dial import read

log = structlog.get_logger("session")

MAX_CALLS = 10_000
SLICE_S = 0.001
"""Longest time in seconds for which requests are read before the event loop runs other tasks."""


class SessionStream:
    """A session. `run` returns when the client has closed its side of the stream and every call has ended."""

    def __init__(
        self, service: CallService, context: Any, caller: Caller, trace: tuple[str, str], age_s: float
    ) -> None:
        """`caller`: the owner of the session. `trace`: traceparent and tracestate for calls that bring no traceparent.
        `age_s`: seconds after which the session accepts no new calls."""
        self._service = service
        self._age_s = age_s
        self._context = context
        self._caller = caller
        self._trace = trace
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        """Future that ends the session: done once the client is done and the last call's end is sent."""
        unread = service.unread_answers.answer(caller.principal.tenant.name)
        self._output = SessionOutput(context, self._over, unread)
        self._calls: dict[int, asyncio.Task[None]] = {}
        """Tasks of the running calls, by call id."""
        self._slice_ends = 0.0
        """Time of the event loop's clock at which the reader of requests must yield to the event loop."""
        self._half_closed = False
        self._retired = False

    async def run(self) -> None:
        """Serve the session until the client is done. If the client disconnects, the running calls are cancelled."""
        reader = asyncio.create_task(self._read())
        reader.add_done_callback(self._read_ended)
        aging = self._loop.call_later(self._age_s, self._retire)
        self._service.calls.on_close.add(self._retire)
        try:
            await self._over
        finally:
            aging.cancel()
            self._service.calls.on_close.discard(self._retire)
            self._over.cancel()
            running = [reader, *self._calls.values()]
            for task in running:
                task.cancel()
            await asyncio.gather(self._output.close(), *running, return_exceptions=True)
        if self._output.stalled:
            message = (
                "the client does not read the session and too much output waits: read faster, or open more sessions"
            )
            await self._context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message)

    # ---- requests

    async def _read(self) -> None:
        self._slice_ends = self._loop.time() + SLICE_S
        while True:
            await self._output.client_reads.wait()
            if (request := await read(self._context)) is None:
                break
            try:
                decoded = await self._service.bodies.session(request, self._tenant())
                release = self._context.request.take_release()
                body = None if release is None else SharedBody(release)
                for item in session_items(decoded) if isinstance(decoded, pb.SessionRequest) else decoded:
                    if isinstance(item, SessionStart):
                        self._start(item, body)
                    elif (task := self._calls.get(item.call_id)) is not None:
                        task.cancel()
                    await self._yield_after_slice()
                if body is not None:
                    body.release_share()
            except CallError as error:
                await self._context.abort(grpc_code(error), error.message, trailers(error))
            await self._yield_after_slice()  # also after messages without a request
        self._half_closed = True
        self._finish_if_done()

    def _read_ended(self, reader: asyncio.Task[None]) -> None:
        error = None if reader.cancelled() else reader.exception()
        if error is not None and not self._over.done():
            self._over.set_exception(error)

    async def _yield_after_slice(self) -> None:
        """Let other tasks run if the time slice of this session is over. Then wait until the client reads, and begin
        the next time slice."""
        if self._loop.time() >= self._slice_ends:
            await asyncio.sleep(0)
            await self._output.client_reads.wait()
            self._slice_ends = self._loop.time() + SLICE_S

    def _tenant(self) -> str:
        """Return the tenant of the session; "" once the caller is no longer allowed to make calls."""
        return "" if self._caller.refused is not None else self._caller.principal.tenant.name

    def _retire(self) -> None:
        """Stop accepting new calls. The stream ends after the last running call; the client opens another session for
        new calls."""
        self._retired = True
        self._finish_if_done()

    def _finish_if_done(self) -> None:
        """End the session if no call runs and no further call can start."""
        if (self._half_closed or self._retired) and not self._calls:
            self._output.finish()

    # ---- calls

    def _start(self, start: SessionStart, body: SharedBody | None) -> None:
        """Start a call. `body`: the bytes of the call's message; None if they count against no budget."""
        call_id = start.call_id
        try:
            self._check_start(call_id)
            meta = self._call_meta(start)
        except CallError as error:
            self._output.send_status(call_id, error)
            return
        if body is not None:
            meta.release_body = body.share()
        task = self._calls[call_id] = asyncio.create_task(self._run(start, meta))
        task.add_done_callback(lambda task: self._end_unstarted(call_id, task))
        if body is not None:
            task.add_done_callback(lambda _: meta.release_body())

    def _check_start(self, call_id: int) -> None:
        """Raise CallError if the session cannot take another call with this id."""
        if call_id in self._calls:
            raise invalid("call_id", f"{call_id} is already running in this session; use another id")
        if self._retired:
            message = "this session takes no more calls: open another session"
            raise CallError(Outcome.NO_WORKER, message, retry_after_s=0.0)
        if len(self._calls) >= MAX_CALLS:
            message = f"a session holds at most {MAX_CALLS} calls; open another session"
            raise CallError(Outcome.QUEUE_FULL, message)

    def _call_meta(self, start: SessionStart) -> CallMeta:
        """Return the metadata of a call. Raises CallError once the caller is no longer allowed to make calls."""
        principal = self._caller.require()
        deadline = self._service.clock() + start.deadline_ms / 1000 if start.deadline_ms else None
        own_id = start.request_id or random_id()
        trace = (start.traceparent, start.trace_state) if start.traceparent else self._trace
        return CallMeta(own_id, "grpc", deadline, *trace, principal)

    async def _run(self, start: SessionStart, meta: CallMeta) -> None:
        """Run one call of the session until it ends."""
        try:
            await self._service.count(meta)
            if isinstance(start.request, CallError):
                raise start.request
            with CallFields(meta.log_fields):
                async with asyncio.timeout(start.deadline_ms / 1000 or None):
                    if isinstance(start.request, ParsedPooling):
                        await self._pool(start.call_id, start.request, meta)
                    else:
                        await self._generate(start, start.request, meta)
        except CallError as error:
            self._end(start.call_id, error)
        except TimeoutError:
            self._end(start.call_id, CallError(Outcome.DEADLINE_EXCEEDED, "the call's deadline_ms has passed"))
        except asyncio.CancelledError:
            self._end(start.call_id, CallError(Outcome.CANCELLED, "cancelled by the client"))
            raise
        except Exception:  # ends this call, not the session
            log.exception("request.failed", **meta.log_fields)
            message = f"unexpected failure; quote request id {meta.request_id}"
            self._end(start.call_id, CallError(Outcome.INTERNAL, message))
        else:
            self._end(start.call_id, None)

    async def _generate(self, start: SessionStart, request: GenerationRequest, meta: CallMeta) -> None:
        """Run a call that generates, and send its chunks."""
        async with self._service.open(request, meta) as call:
            kind, progress = CHAT if start.is_chat else COMPLETE, self._service.keepalives.progress
            encoder = session_encoder_for(kind, call, progress, start.call_id)
            await SessionWriter(self._output, start.call_id, call, encoder).run()

    async def _pool(self, call_id: int, parsed: ParsedPooling, meta: CallMeta) -> None:
        """Run a pooling call, and send its answer in one event."""
        with self._service.unread_answers.answer(meta.tenant, copies=2) as unread:  # the event, and its unsent bytes
            async with self._service.open_pooling(parsed.request, meta, unread) as call:
                vectors = await call.vectors()
            answer = await pooling_response(call, vectors, parsed)
            is_embed = not isinstance(parsed.request.inputs, PairInputs)
            event = event_answer(call_id, is_embed, answer)
            del answer
            await self._output.send_whole(event)

    def _end_unstarted(self, call_id: int, task: asyncio.Task[None]) -> None:
        """End a call whose task was cancelled before the first step of the task. That happens if the client sends the
        start and the cancellation of a call together."""
        if self._calls.get(call_id) is task:
            self._end(call_id, CallError(Outcome.CANCELLED, "cancelled by the client"))

    def _end(self, call_id: int, error: CallError | None) -> None:
        del self._calls[call_id]
        if error is not None:
            self._output.send_status(call_id, error)
        self._finish_if_done()
