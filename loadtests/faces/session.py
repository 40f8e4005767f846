"""Client of Inference.Session: a few streams carry all calls. Each message from the server holds everything that has
accumulated since the previous message.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

import grpc
from google.rpc import status_pb2

from cluster.v1 import inference_pb2 as pb
from loadtests.faces.base import Answer, CallFailed, OnText, Request
from loadtests.faces.grpc_stream import OPTIONS, answer, failure, message_of

SESSION = "/cluster.v1.Inference/Session"
_ENDED = "the session ended before the call did"


class _Call:
    __slots__ = ("chat", "done", "finish", "on_text", "started")

    def __init__(self, request: Request, on_text: OnText) -> None:
        self.chat = request.chat
        self.on_text = on_text
        self.finish = ""
        self.started = False
        self.done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def text(self, text: str) -> None:
        self.started = True
        self.on_text(text)

    def chunk(self, chunk: Any) -> bool:
        """Handle a chunk; return whether the chunk was the last."""
        for choice in chunk.choices:
            piece = choice.delta.content if self.chat else choice.text
            if piece:
                self.text(piece)
            self.finish = choice.finish_reason or self.finish
        if not chunk.HasField("usage"):
            return False
        self._end(answer(chunk.usage, self.finish))
        return True

    def _end(self, answer: Answer) -> None:
        if not self.done.done():
            self.done.set_result(answer)

    def fail(self, error: CallFailed) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class _Stream:
    """A session: one gRPC stream that carries several calls. The first call opens the stream. If the stream breaks, the
    next call opens a new one."""

    def __init__(self, address: str, metadata: tuple[tuple[str, str], ...]) -> None:
        self._metadata = metadata
        self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self._method: Any = self._channel.stream_stream(
            SESSION,
            request_serializer=pb.SessionRequest.SerializeToString,
            response_deserializer=pb.SessionEvents.FromString,
        )
        self._rpc: Any = None
        self._reader: asyncio.Task[None] | None = None
        self._calls: dict[int, _Call] = {}
        self._lock = asyncio.Lock()

    async def start(self, number: int, call: _Call, message: Any, chat: bool) -> None:
        start = pb.SessionStart(call_id=number, chat=message) if chat else pb.SessionStart(call_id=number)
        if not chat:
            start.complete.CopyFrom(message)
        if self._rpc is None or self._reader is None or self._reader.done():
            self._rpc = self._method(metadata=self._metadata)
            self._reader = asyncio.create_task(self._read(self._rpc))
        self._calls[number] = call
        await self._write(pb.SessionRequest(start=start), call)

    async def cancel(self, number: int) -> None:
        if self._calls.pop(number, None) is not None and self._reader is not None and not self._reader.done():
            await self._write(pb.SessionRequest(cancel=pb.SessionCancel(call_id=number)), None)

    async def _write(self, message: pb.SessionRequest, call: _Call | None) -> None:
        try:
            async with self._lock:
                await self._rpc.write(message)
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            if call is not None:
                call.fail(failure(error, False) if isinstance(error, grpc.RpcError) else _closed())

    async def _read(self, rpc: Any) -> None:
        ended: CallFailed = _closed()
        try:
            async for events in rpc:
                for event in events.events:
                    self._event(event)
        except grpc.RpcError as error:
            ended = failure(error, any(call.started for call in self._calls.values()))
        except CallFailed as error:
            ended = error
        finally:
            calls, self._calls = self._calls, {}
            for call in calls.values():
                call.fail(ended)

    def _event(self, event: pb.SessionEvent) -> None:
        call = self._calls.get(event.call_id)
        if call is None:
            return
        if event.text:
            call.text(event.text)
            return
        if event.status:
            status = status_pb2.Status.FromString(event.status)
            call.fail(_refused(status))
            del self._calls[event.call_id]
        elif call.chunk(event.chat if call.chat else event.complete):
            del self._calls[event.call_id]

    async def close(self) -> None:
        if self._rpc is not None:
            self._rpc.cancel()
        if self._reader is not None:
            await asyncio.gather(self._reader, return_exceptions=True)
        await self._channel.close()


def _closed() -> CallFailed:
    return CallFailed(CallFailed.BROKEN, _ENDED)


def _refused(status: Any) -> CallFailed:
    names = {code.value[0]: code.name for code in grpc.StatusCode}
    return CallFailed(f"status {names.get(status.code, status.code)}", status.message)


class Sessions:
    """Client that spreads calls over `sessions` streams in turn."""

    name = "session"

    def __init__(
        self, address: str, model: str, *, sessions: int = 16, metadata: Sequence[tuple[str, str]] = ()
    ) -> None:
        self._model = model
        self._streams = [_Stream(address, tuple(metadata)) for _ in range(sessions)]
        self._numbers = itertools.count(1)

    async def run(self, request: Request, on_text: OnText) -> Answer:
        """Make a call; see Face.run."""
        while True:
            number = next(self._numbers)
            stream = self._streams[number % len(self._streams)]
            call = _Call(request, on_text)
            try:
                await stream.start(number, call, message_of(request, self._model), request.chat)
                return await call.done
            except CallFailed as error:
                if call.started or error.message != _ENDED:  # else a gateway has ended an old session
                    raise
            finally:
                await stream.cancel(number)

    async def close(self) -> None:
        """Close all connections; see Face.close."""
        for stream in self._streams:
            await stream.close()
