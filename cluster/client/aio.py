"""The client for asyncio code. AsyncClient has the same methods as cluster.client.sync.Client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
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
    text_chunk,
)
from cluster.client.attempts import Method, StreamAttempts
from cluster.client.errors import UNREACHABLE, HeadraceError, from_rpc
from cluster.client.gateways import GatewayList
from cluster.client.options import DEFAULT_TIMEOUT_S, MAX_MESSAGE_BYTES, ChannelOptions, new_request_id
from cluster.client.pooling import (
    EmbedAnswer,
    PoolingParams,
    RerankAnswer,
    Texts,
    embed_answer,
    embed_request,
    rerank_answer,
    rerank_request,
)
from cluster.client.requests import (
    ChatParams,
    Messages,
    SamplingParams,
    chat_request,
    complete_request,
    tokenize_request,
)
from cluster.client.resume import Request
from cluster.client.session import SessionCall, Sessions
from cluster.client.trace_context import TRACE_HEADERS
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

    def __init__(self, attempts: _SessionAttempts, endpoint: str, on_end: Callable[[], None]) -> None:
        """Initialize the stream of a started call. Errors name `endpoint`. `on_end` is called once, at the end."""
        super().__init__(attempts.request_id)
        self._attempts = attempts
        self._endpoint = endpoint
        self._on_end: Callable[[], None] | None = on_end
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
                whole: Any = text_chunk(self._attempts.resumption.request, chunk)
                whole.id, whole.model = self.id, self.model
                chunk = whole
            yield chunk

    async def _next(self) -> Chunk | str:
        attempts = self._attempts
        while True:
            try:
                chunk: Any = await attempts.call.read()
            except grpc.RpcError as error:
                failed = from_rpc(error, endpoint=self._endpoint, request_id=self.request_id)
            except HeadraceError as error:
                failed = error
            else:
                if chunk is aio.EOF:
                    self._finish()
                    raise StopAsyncIteration
                chunk = attempts.resumption.record(chunk)
                if chunk is None:
                    continue
                typed: Chunk | str = chunk
                return typed
            if not await self._resume(failed):
                self._finish()
                raise failed from None

    async def _resume(self, failed: HeadraceError) -> bool:
        pause_s = self._attempts.pause_after(failed)
        if pause_s is None or self._cancelled:
            return False
        await asyncio.sleep(pause_s)
        if self._cancelled:
            return False
        self._attempts.resume()
        return True

    def _finish(self) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end()

    def cancel(self) -> None:
        """End the call now. Does nothing if the call has ended."""
        self._cancelled = True
        self._attempts.call.cancel()
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


@dataclass(eq=False)
class _SessionAttempts(StreamAttempts):
    """The calls of one stream. Each call runs in a session, or is a plain gRPC stream if `sessions` is None."""

    sessions: Sessions | None

    @property
    def endpoint(self) -> str:
        """The endpoint of the gateway to which the current call was sent."""
        return self.call.endpoint if isinstance(self.call, SessionCall) else self._endpoint

    def _begin(self, request: Any, method: Method) -> Any:
        if self.sessions is None:
            return super()._begin(request, method)
        call = SessionCall(
            request,
            self.resumption.remaining_s,
            dict(self.metadata),
            lambda: super(_SessionAttempts, self)._begin(request, method),
            self.sessions,
        )
        self.sessions.start(call)
        return call


class AsyncClient:
    """A connection to a gateway. Call `close` at the end, or use an `async with` block.

    The client belongs to the event loop in which the client is created. A failed call raises HeadraceError.
    `timeout_s` is the deadline of the whole call, and the gateway passes the deadline on to the engine. `request_id`
    is generated if the caller gives none. A call that fails with UNAVAILABLE is retried if no part of the answer has
    arrived. Concurrent streams share a session (cluster.client.session).

    With `resume`, a broken stream is resumed. `endpoint` may name several gateways, as a list or comma-separated, or
    resolve to several addresses. Then a broken stream is resumed on another of these gateways.
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
        return self._stream(lambda stub: stub.StreamChat, request, timeout_s, request_id, headers)

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
        return self._stream(lambda stub: stub.StreamComplete, request, timeout_s, request_id, headers)

    async def embed(
        self,
        model: str,
        texts: Texts,
        *,
        dimensions: int | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        **params: Unpack[PoolingParams],
    ) -> EmbedAnswer:
        """Return the vectors of a text, of several texts, or of lists of token ids. `dimensions`: length of the
        vectors, for models that allow shorter ones."""
        request_id = request_id or new_request_id()
        request = embed_request(model, texts, dimensions, params)
        raw = await self._unary(lambda stub: stub.Embed, request, timeout_s, request_id, headers)
        return embed_answer(raw, request_id)

    async def rerank(
        self,
        model: str,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        return_documents: bool = False,
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        **params: Unpack[PoolingParams],
    ) -> RerankAnswer:
        """Return documents by their relevance to a query, the best first. `top_n`: maximum number of documents."""
        request_id = request_id or new_request_id()
        request = rerank_request(model, query, documents, top_n, return_documents, params)
        raw = await self._unary(lambda stub: stub.Rerank, request, timeout_s, request_id, headers)
        return rerank_answer(raw, request_id)

    async def tokenize(
        self,
        model: str,
        text: str | Messages,
        *,
        tools: Sequence[Mapping[str, Any] | pb.Tool] = (),
        timeout_s: float | None = None,
    ) -> list[int]:
        """Return the token ids of a text. Messages are converted to a text by the model's chat template first, together
        with `tools`."""
        request = tokenize_request(model, text, tools)
        return list((await self._unary(lambda stub: stub.Tokenize, request, timeout_s)).token_ids)

    async def detokenize(self, model: str, token_ids: Sequence[int], *, timeout_s: float | None = None) -> str:
        """Return the text for a sequence of token ids."""
        request = pb.DetokenizeRequest(model=model, token_ids=token_ids)
        return (await self._unary(lambda stub: stub.Detokenize, request, timeout_s)).text

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
        """Return the model whose name or alias is `name`."""
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
        method: Callable[[InferenceAsyncStub], Callable[..., AsyncIterable[Chunk]]],
        request: Request,
        timeout_s: float | None,
        request_id: str | None,
        headers: Mapping[str, str] | None,
    ) -> AsyncStream[Chunk]:
        request_id = request_id or new_request_id()
        resumption, metadata = self._options.resumption(request, timeout_s), self._options.metadata(request_id, headers)
        # headers belong to one call, but all calls of a session share the session's headers
        has_headers = bool(set(headers or ()).difference(TRACE_HEADERS))
        sessions = self._sessions if self._streams and not has_headers else None
        attempts = _SessionAttempts(self._gateways, method, resumption, request_id, metadata, sessions)
        attempts.start()
        self._streams += 1
        return AsyncStream(attempts, self._options.endpoint, self._stream_ended)

    def _stream_ended(self) -> None:
        self._streams -= 1

    async def _reconnect_early(self, channel: aio.Channel) -> None:
        """While streams are running, reconnect as soon as the connection to a draining gateway is lost.

        The streams of the draining gateway can then be resumed at once. Without this method, gRPC would reconnect only
        at the next call.
        """
        state = channel.get_state()
        while state is not grpc.ChannelConnectivity.SHUTDOWN:
            await channel.wait_for_state_change(state)
            state = channel.get_state(try_to_connect=bool(self._streams))
