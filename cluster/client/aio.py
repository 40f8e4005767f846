"""The client for asyncio code. The client has the same methods as the client in cluster.client.sync."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, Unpack

import grpc
from grpc import aio

from cluster.client.answers import (
    ChatAnswer,
    Chunk,
    CompleteAnswer,
    StreamState,
    chat_answer,
    complete_answer,
)
from cluster.client.errors import UNREACHABLE, HeadraceError, from_rpc
from cluster.client.gateways import GatewayList
from cluster.client.options import DEFAULT_TIMEOUT_S, MAX_MESSAGE_BYTES, ChannelOptions, new_request_id
from cluster.client.requests import ChatParams, Messages, SamplingParams, chat_request, complete_request, to_messages
from cluster.client.resume import Request, Resumption
from cluster.client.session import SessionCall, Sessions
from cluster.v1 import inference_pb2 as pb
from cluster.v1.inference_pb2_grpc import InferenceStub

if TYPE_CHECKING:
    from cluster.v1.inference_pb2_grpc import InferenceAsyncStub

Response = TypeVar("Response")


class AsyncStream(StreamState, Generic[Chunk]):
    """A streamed answer.

    Iterate over the stream to read the first choice's text. Iterate over `chunks()` to read every message of all
    choices. `text`, `finish_reason`, `usage`, `id`, `model` and `request_id` have the values received so far; the
    usage is received last. Leaving an `async with` block, calling `cancel()` or dropping the stream object ends the
    call at the gateway.
    """

    def __init__(
        self,
        call: Any,
        request_id: str,
        endpoint: str,
        chunk_of: Callable[[str], Chunk],
        attempts: _AsyncAttempts,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        """Initialize the stream of a running call.

        Sessions send plain texts, and `chunk_of` makes a chunk from a text. `attempts` resumes a broken call. `on_end`
        is called once, when the stream ends.
        """
        super().__init__(request_id)
        self._call = call
        self._endpoint = endpoint
        self._chunk_of: Callable[[str], Chunk] = chunk_of
        self._on_end = on_end
        self._attempts = attempts
        self._cancelled = False

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        while True:
            text = self._record(await self._next())
            if text:
                return text

    async def chunks(self) -> AsyncIterator[Chunk]:
        """Yield every chunk in the form of the API, including progress messages. Raises HeadraceError."""
        while True:
            try:
                chunk = await self._next()
            except StopAsyncIteration:
                return
            self._record(chunk)
            if isinstance(chunk, str):
                chunk = self._chunk_of(chunk)
                chunk.id, chunk.model = self.id, self.model
            yield chunk

    async def _next(self) -> Chunk | str:
        while True:
            try:
                chunk: Any = await self._call.read()
            except grpc.RpcError as error:
                failed = from_rpc(error, endpoint=self._endpoint, request_id=self.request_id)
            except HeadraceError as error:
                failed = error
            else:
                if chunk is aio.EOF:
                    self._finish()
                    raise StopAsyncIteration
                chunk = self._attempts.resumption.record(chunk)
                if chunk is None:
                    continue
                typed: Chunk | str = chunk
                return typed
            if not await self._resume(failed):
                self._finish()
                raise failed from None

    async def _resume(self, failed: HeadraceError) -> bool:
        if failed.reason == UNREACHABLE:
            self._attempts.switch_gateway(self._call)
        pause_s = None if self._cancelled else self._attempts.resumption.pause_s(failed)
        if pause_s is None:
            return False
        await asyncio.sleep(pause_s)
        if self._cancelled:
            return False
        self._call = self._attempts.resume_call(self._call)
        return True

    def _finish(self) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end()

    def cancel(self) -> None:
        """End the call now. Does nothing if the call has ended."""
        self._cancelled = True
        self._call.cancel()
        self._finish()

    def __del__(self) -> None:
        if self._on_end is not None:  # dropped before the end: the session would continue to receive chunks
            self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class _AsyncAttempts:
    """The calls of one stream: the first call, and the calls that resume the stream."""

    def __init__(
        self,
        gateways: GatewayList[aio.Channel, InferenceAsyncStub],
        sessions: Sessions,
        method: Callable[[InferenceAsyncStub], Callable[..., Any]],
        resumption: Resumption,
        request_id: str,
        metadata: tuple[tuple[str, str], ...],
    ) -> None:
        """Prepare the calls of a stream. `method` starts the first call."""
        self._gateways = gateways
        self._sessions = sessions
        self._method = method
        self.resumption = resumption
        self._request_id = request_id
        self._metadata = metadata
        self._endpoint = ""

    def begin(self, shared: bool) -> Any:
        """Start the first call. If `shared`, the call is started in a session."""
        return self._call(self.resumption.request, self._method, shared)

    def switch_gateway(self, broken: Any) -> None:
        """Use the next gateway, because the gateway of the call `broken` does not answer.

        Does nothing if the client has only one endpoint.
        """
        self._gateways.switch_from(broken.endpoint if isinstance(broken, SessionCall) else self._endpoint)

    def resume_call(self, broken: Any) -> Any:
        """Switch gateways and start the call that resumes `broken`.

        If `broken` was a call in a session, the new call is started in a session too.
        """
        self.switch_gateway(broken)
        request, shared = self.resumption.resume_request, isinstance(broken, SessionCall)
        if request is None:
            return self.begin(shared)
        return self._call(request, lambda stub: stub.Resume, shared)

    def _call(self, request: Any, method: Callable[[InferenceAsyncStub], Callable[..., Any]], shared: bool) -> Any:
        remaining_s = self.resumption.remaining_s

        def open_stream() -> Any:
            self._endpoint = self._gateways.endpoint
            return method(self._gateways.stub)(request, timeout=self.resumption.remaining_s, metadata=self._metadata)

        if not shared:
            return open_stream()
        call = SessionCall(request, remaining_s, self._request_id, open_stream, self._sessions)
        self._sessions.start(call)
        return call


class AsyncClient:
    """A connection to a gateway. Call `close` at the end, or use an `async with` block.

    The client belongs to the event loop in which the client is created. A failed call raises HeadraceError.
    `timeout_s` is the deadline of the whole call, and the gateway passes the deadline on to the engine. `request_id`
    is generated if the caller gives none. A call that fails with UNAVAILABLE is retried unless a part of the answer
    has arrived. Concurrent streams share a session (cluster.client.session).

    A broken stream is resumed unless `resume` is False. `endpoint` may name several gateways, as a list or
    comma-separated, or resolve to several addresses; then the stream is resumed on another gateway.
    """

    def __init__(
        self,
        endpoint: str | Sequence[str] | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        tls: bool = False,
        tls_ca_file: str | Path | None = None,
        retries: bool = True,
        resume: bool = True,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._options = ChannelOptions.build(
            endpoint,
            api_key,
            tls_ca_file,
            timeout_s=timeout_s,
            tls=tls,
            retries=retries,
            resume=resume,
            max_message_bytes=max_message_bytes,
        )
        credentials = self._options.credentials()
        arguments = self._options.channel_options()

        def connect(endpoint: str) -> tuple[aio.Channel, InferenceAsyncStub]:
            channel = (
                aio.secure_channel(endpoint, credentials, options=arguments)
                if credentials
                else aio.insecure_channel(endpoint, options=arguments)
            )
            self._reconnect_tasks.append(asyncio.create_task(self._reconnect_early(channel)))
            return channel, InferenceStub(channel)

        self._reconnect_tasks: list[asyncio.Task[None]] = []
        self._gateways = GatewayList(self._options.endpoints, connect)
        self._sessions = Sessions(self._gateways, self._options)
        self._streams = 0

    def __repr__(self) -> str:
        return f"AsyncClient({self._options.endpoint!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection and end all calls on the connection."""
        for task in self._reconnect_tasks:
            task.cancel()
        await asyncio.gather(*self._reconnect_tasks, return_exceptions=True)
        await self._sessions.close()
        for channel in self._gateways.channels:
            await channel.close()

    async def chat(
        self,
        model: str,
        messages: Messages,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        **params: Unpack[ChatParams],
    ) -> ChatAnswer:
        """Return the whole answer to a prompt (a string) or to a conversation."""
        request_id = request_id or new_request_id()
        request = chat_request(model, messages, params)
        raw = await self._unary(lambda stub: stub.Chat, request, timeout_s, request_id, headers)
        return chat_answer(raw, request_id)

    def stream_chat(
        self,
        model: str,
        messages: Messages,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        **params: Unpack[ChatParams],
    ) -> AsyncStream[pb.ChatChunk]:
        """Return the answer to a prompt (a string) or to a conversation, as a stream."""
        request = chat_request(model, messages, params)
        return self._stream(lambda stub: stub.StreamChat, request, _chat_text, timeout_s, request_id, headers)

    async def complete(
        self,
        model: str,
        prompt: str | Sequence[int],
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        **params: Unpack[SamplingParams],
    ) -> CompleteAnswer:
        """Return the whole continuation of a plain prompt (a text or token ids)."""
        request_id = request_id or new_request_id()
        request = complete_request(model, prompt, params)
        raw = await self._unary(lambda stub: stub.Complete, request, timeout_s, request_id, headers)
        return complete_answer(raw, request_id)

    def stream_complete(
        self,
        model: str,
        prompt: str | Sequence[int],
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        **params: Unpack[SamplingParams],
    ) -> AsyncStream[pb.CompleteChunk]:
        """Return the continuation of a plain prompt (a text or token ids), as a stream."""
        request = complete_request(model, prompt, params)
        return self._stream(lambda stub: stub.StreamComplete, request, _complete_text, timeout_s, request_id, headers)

    async def tokenize(self, model: str, text: str | Messages, *, timeout_s: float | None = None) -> list[int]:
        """Return the token ids of a text. Messages are converted to a text by the model's chat template first."""
        request = pb.TokenizeRequest(model=model)
        if isinstance(text, str):
            request.text = text
        else:
            request.messages.extend(to_messages(text))
        answer = await self._unary(lambda stub: stub.Tokenize, request, timeout_s)
        return list(answer.token_ids)

    async def detokenize(self, model: str, token_ids: Sequence[int], *, timeout_s: float | None = None) -> str:
        """Return the text for a sequence of token ids."""
        request = pb.DetokenizeRequest(model=model, token_ids=token_ids)
        answer = await self._unary(lambda stub: stub.Detokenize, request, timeout_s)
        return answer.text

    async def models(self, *, timeout_s: float | None = None) -> list[pb.Model]:
        """Return all models that the caller may use, with each model's state."""
        models: list[pb.Model] = []
        page = ""
        while True:
            answer = await self._unary(lambda stub: stub.ListModels, pb.ListModelsRequest(page_token=page), timeout_s)
            models.extend(answer.models)
            page = answer.next_page_token
            if not page:
                return models

    async def model(self, name: str, *, timeout_s: float | None = None) -> pb.Model:
        """Return the model with a name or alias."""
        return await self._unary(lambda stub: stub.GetModel, pb.GetModelRequest(name=name), timeout_s)

    async def _unary(
        self,
        method: Callable[[InferenceAsyncStub], Callable[..., Awaitable[Response]]],
        request: object,
        timeout_s: float | None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        request_id = request_id or new_request_id()
        timeout_s = self._options.timeout_s if timeout_s is None else timeout_s
        for remaining in reversed(range(len(self._options.endpoints))):
            endpoint = self._gateways.endpoint
            try:
                metadata = self._options.metadata(request_id, headers)
                return await method(self._gateways.stub)(request, timeout=timeout_s, metadata=metadata)
            except grpc.RpcError as error:
                failed = from_rpc(error, endpoint=self._options.endpoint, request_id=request_id)
            if failed.reason != UNREACHABLE:
                raise failed
            self._gateways.switch_from(endpoint)
            if not remaining or not self._options.retries:
                raise failed
        raise AssertionError("unreachable: there is at least one endpoint")

    def _stream(
        self,
        method: Callable[[InferenceAsyncStub], Callable[..., Any]],
        request: Request,
        chunk_of: Callable[[str], Chunk],
        timeout_s: float | None,
        request_id: str | None,
        headers: Mapping[str, str] | None,
    ) -> AsyncStream[Chunk]:
        request_id = request_id or new_request_id()
        timeout_s = self._options.timeout_s if timeout_s is None else timeout_s
        metadata = self._options.metadata(request_id, headers)
        options = self._options
        resumption = Resumption(
            options.make_resumable(request), timeout_s, len(options.endpoints), enabled=options.resume
        )
        attempts = _AsyncAttempts(self._gateways, self._sessions, method, resumption, request_id, metadata)
        # headers belong to one call, but all calls of a session share the session's headers
        call = attempts.begin(shared=bool(self._streams) and not headers)
        self._streams += 1
        return AsyncStream(call, request_id, self._options.endpoint, chunk_of, attempts, self._stream_ended)

    def _stream_ended(self) -> None:
        self._streams -= 1

    async def _reconnect_early(self, channel: aio.Channel) -> None:
        """While streams are running, reconnect as soon as a draining gateway gives up the connection.

        So a stream that the draining gateway hands over is resumed at once. gRPC itself reconnects only for the next
        call.
        """
        state = channel.get_state()
        while state is not grpc.ChannelConnectivity.SHUTDOWN:
            await channel.wait_for_state_change(state)
            state = channel.get_state(try_to_connect=bool(self._streams))


def _chat_text(text: str) -> pb.ChatChunk:
    return pb.ChatChunk(choices=[pb.ChoiceDelta(delta=pb.Message(content=text))])


def _complete_text(text: str) -> pb.CompleteChunk:
    return pb.CompleteChunk(choices=[pb.CompleteChoice(text=text)])
