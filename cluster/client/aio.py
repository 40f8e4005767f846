"""The client for asyncio code. The same calls as cluster.client.sync, awaited."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

import grpc
from grpc import aio

from cluster.client.answers import (
    Account,
    ChatAnswer,
    Chunk,
    CompleteAnswer,
    chat_answer,
    complete_answer,
)
from cluster.client.errors import HeadraceError, from_rpc
from cluster.client.options import DEFAULT_TIMEOUT_S, MAX_MESSAGE_BYTES, Options, new_request_id
from cluster.client.requests import ChatParams, Messages, SamplingParams, chat_request, complete_request, to_messages
from cluster.client.session import Request, SessionCall, Sessions
from cluster.v1 import inference_pb2 as pb
from cluster.v1.inference_pb2_grpc import InferenceStub

Response = TypeVar("Response")


class AsyncStream(Account, Generic[Chunk]):
    """The text of an answer while it is made: iterate it, or `chunks()` for every message of all choices.

    `text`, `finish_reason`, `usage`, `id`, `model` and `request_id` tell what has come so far; usage comes last.
    Leaving an `async with` block, `cancel()` or dropping the object ends the call at the gateway.
    """

    def __init__(
        self,
        call: Any,
        request_id: str,
        endpoint: str,
        chunk_of: Callable[[str], Chunk],
        on_end: Callable[[], None] | None = None,
    ) -> None:
        """`chunk_of` makes a chunk of a piece of text alone, as sessions send it; `on_end` is called once."""
        super().__init__(request_id)
        self._call = call
        self._endpoint = endpoint
        self._chunk_of: Callable[[str], Chunk] = chunk_of
        self._on_end = on_end

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        while True:
            text = self._take(await self._next())
            if text:
                return text

    async def chunks(self) -> AsyncIterator[Chunk]:
        """Every chunk as the API sends it, progress included. Raises HeadraceError."""
        while True:
            try:
                found = await self._next()
            except StopAsyncIteration:
                return
            self._take(found)
            if isinstance(found, str):
                found = self._chunk_of(found)
                found.id, found.model = self.id, self.model
            yield found

    async def _next(self) -> Chunk | str:
        try:
            chunk: Chunk | str = await self._call.read()
        except grpc.RpcError as error:
            self._finish()
            raise from_rpc(error, endpoint=self._endpoint, request_id=self.request_id) from None
        except HeadraceError:
            self._finish()
            raise
        if chunk is aio.EOF:
            self._finish()
            raise StopAsyncIteration
        return chunk

    def _finish(self) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end()

    def cancel(self) -> None:
        """End the call now; nothing happens when it has ended."""
        self._call.cancel()
        self._finish()

    def __del__(self) -> None:
        if self._on_end is not None:  # dropped before its end: a session would go on reading it
            self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class AsyncClient:
    """A connection to a gateway. Belongs to the event loop it is made in; `close` it, or use `async with`.

    Every call raises HeadraceError when it fails. `timeout_s` is the deadline of the whole call, which travels with
    it to the engine; `request_id` is made up where none is given. UNAVAILABLE is retried while nothing of the answer
    has arrived. From the second stream under way on, streams share a session (cluster.client.session).
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        tls: bool = False,
        tls_ca_file: str | Path | None = None,
        retries: bool = True,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._options = Options.build(
            endpoint,
            api_key,
            tls_ca_file,
            timeout_s=timeout_s,
            tls=tls,
            retries=retries,
            max_message_bytes=max_message_bytes,
        )
        credentials = self._options.credentials()
        arguments = self._options.channel_options()
        self._channel = (
            aio.secure_channel(self._options.endpoint, credentials, options=arguments)
            if credentials
            else aio.insecure_channel(self._options.endpoint, options=arguments)
        )
        self._stub = InferenceStub(self._channel)
        self._sessions = Sessions(self._stub, self._options)
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
        """End the connection and every call on it."""
        await self._sessions.close()
        await self._channel.close()

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
        """The whole answer to a question (a string) or a conversation."""
        request_id = request_id or new_request_id()
        request = chat_request(model, messages, params)
        raw = await self._unary(self._stub.Chat, request, timeout_s, request_id, headers)
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
        """The answer in pieces, as it is made."""
        request = chat_request(model, messages, params)
        return self._stream(self._stub.StreamChat, request, _chat_text, timeout_s, request_id, headers)

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
        """The continuation of a plain prompt (a text or token ids)."""
        request_id = request_id or new_request_id()
        request = complete_request(model, prompt, params)
        raw = await self._unary(self._stub.Complete, request, timeout_s, request_id, headers)
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
        """The continuation in pieces, as it is made."""
        request = complete_request(model, prompt, params)
        return self._stream(self._stub.StreamComplete, request, _complete_text, timeout_s, request_id, headers)

    async def tokenize(self, model: str, text: str | Messages, *, timeout_s: float | None = None) -> list[int]:
        """The token ids of a text, or of messages under the model's chat template."""
        request = pb.TokenizeRequest(model=model)
        if isinstance(text, str):
            request.text = text
        else:
            request.messages.extend(to_messages(text))
        answer = await self._unary(self._stub.Tokenize, request, timeout_s)
        return list(answer.token_ids)

    async def detokenize(self, model: str, token_ids: Sequence[int], *, timeout_s: float | None = None) -> str:
        """The text of token ids."""
        request = pb.DetokenizeRequest(model=model, token_ids=token_ids)
        answer = await self._unary(self._stub.Detokenize, request, timeout_s)
        return answer.text

    async def models(self, *, timeout_s: float | None = None) -> list[pb.Model]:
        """All models that the caller may use, with their state."""
        found: list[pb.Model] = []
        page = ""
        while True:
            answer = await self._unary(self._stub.ListModels, pb.ListModelsRequest(page_token=page), timeout_s)
            found.extend(answer.models)
            page = answer.next_page_token
            if not page:
                return found

    async def model(self, name: str, *, timeout_s: float | None = None) -> pb.Model:
        """One model by name or alias."""
        return await self._unary(self._stub.GetModel, pb.GetModelRequest(name=name), timeout_s)

    async def _unary(
        self,
        method: Callable[..., Awaitable[Response]],
        request: object,
        timeout_s: float | None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        request_id = request_id or new_request_id()
        try:
            return await method(
                request,
                timeout=self._options.timeout_s if timeout_s is None else timeout_s,
                metadata=self._options.metadata(request_id, headers),
            )
        except grpc.RpcError as error:
            raise from_rpc(error, endpoint=self._options.endpoint, request_id=request_id) from None

    def _stream(
        self,
        method: Callable[..., Any],
        request: Request,
        chunk_of: Callable[[str], Chunk],
        timeout_s: float | None,
        request_id: str | None,
        headers: Mapping[str, str] | None,
    ) -> AsyncStream[Chunk]:
        request_id = request_id or new_request_id()
        timeout_s = self._options.timeout_s if timeout_s is None else timeout_s
        metadata = self._options.metadata(request_id, headers)

        def plain() -> Any:
            return method(request, timeout=timeout_s, metadata=metadata)

        if self._streams and not headers:  # headers belong to a call, and a session has one set for all
            call: Any = SessionCall(request, timeout_s, request_id, plain, self._sessions)
            self._sessions.start(call)
        else:
            call = plain()
        self._streams += 1
        return AsyncStream(call, request_id, self._options.endpoint, chunk_of, self._stream_ended)

    def _stream_ended(self) -> None:
        self._streams -= 1


def _chat_text(text: str) -> pb.ChatChunk:
    return pb.ChatChunk(choices=[pb.ChoiceDelta(delta=pb.Message(content=text))])


def _complete_text(text: str) -> pb.CompleteChunk:
    return pb.CompleteChunk(choices=[pb.CompleteChoice(text=text)])
