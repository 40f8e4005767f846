"""The client for asyncio code. The same calls as cluster.client.sync, awaited."""

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
    StreamAccount,
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


class AsyncStream(StreamAccount, Generic[Chunk]):
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
        onward: _AsyncResumption,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        """`chunk_of` makes a chunk of a piece of text alone, as sessions send it; `onward` goes on with a call that has
        broken; `on_end` is called once."""
        super().__init__(request_id)
        self._call = call
        self._endpoint = endpoint
        self._chunk_of: Callable[[str], Chunk] = chunk_of
        self._on_end = on_end
        self._onward = onward
        self._cancelled = False

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
                chunk = self._onward.resumption.note(chunk)
                if chunk is None:
                    continue
                found: Chunk | str = chunk
                return found
            if not await self._go_on(failed):
                self._finish()
                raise failed from None

    async def _go_on(self, failed: HeadraceError) -> bool:
        if failed.reason == UNREACHABLE:
            self._onward.leave(self._call)
        pause_s = None if self._cancelled else self._onward.resumption.pause_s(failed)
        if pause_s is None:
            return False
        await asyncio.sleep(pause_s)
        if self._cancelled:
            return False
        self._call = self._onward.again(self._call)
        return True

    def _finish(self) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end()

    def cancel(self) -> None:
        """End the call now; nothing happens when it has ended."""
        self._cancelled = True
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


class _AsyncResumption:
    """One stream's calls: the first, and those that go on with it."""

    def __init__(
        self,
        gateways: GatewayList[aio.Channel, InferenceAsyncStub],
        sessions: Sessions,
        method: Callable[[InferenceAsyncStub], Callable[..., Any]],
        resumption: Resumption,
        request_id: str,
        metadata: tuple[tuple[str, str], ...],
    ) -> None:
        """`method` begins."""
        self._gateways = gateways
        self._sessions = sessions
        self._method = method
        self.resumption = resumption
        self._request_id = request_id
        self._metadata = metadata
        self._asked = ""

    def begin(self, shared: bool) -> Any:
        """The call; `shared`: in a session."""
        return self._call(self.resumption.request, self._method, shared)

    def leave(self, broken: Any) -> None:
        """The gateway of a call does not answer: whatever comes next goes to another, where there are several."""
        self._gateways.turn(broken.asked if isinstance(broken, SessionCall) else self._asked)

    def again(self, broken: Any) -> Any:
        """The call that goes on with a broken one, likewise."""
        self.leave(broken)
        request, shared = self.resumption.resumes, isinstance(broken, SessionCall)
        if request is None:
            return self.begin(shared)
        return self._call(request, lambda stub: stub.Resume, shared)

    def _call(self, request: Any, method: Callable[[InferenceAsyncStub], Callable[..., Any]], shared: bool) -> Any:
        left_s = self.resumption.left_s

        def plain() -> Any:
            self._asked = self._gateways.endpoint
            return method(self._gateways.stub)(request, timeout=self.resumption.left_s, metadata=self._metadata)

        if not shared:
            return plain()
        call = SessionCall(request, left_s, self._request_id, plain, self._sessions)
        self._sessions.start(call)
        return call


class AsyncClient:
    """A connection to a gateway. Belongs to the event loop it is made in; `close` it, or use `async with`.

    Every call raises HeadraceError when it fails. `timeout_s` is the deadline of the whole call, which travels with
    it to the engine; `request_id` is made up where none is given. UNAVAILABLE is retried while nothing of the answer
    has arrived. From the second stream under way on, streams share a session (cluster.client.session). A stream that
    breaks goes on by itself, at another gateway where `endpoint` names or resolves to several (a list, or with commas
    between them), unless `resume` is False.
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
            self._watches.append(asyncio.create_task(self._keep_up(channel)))
            return channel, InferenceStub(channel)

        self._watches: list[asyncio.Task[None]] = []
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
        """End the connection and every call on it."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
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
        """The whole answer to a question (a string) or a conversation."""
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
        """The answer in pieces, as it is made."""
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
        """The continuation of a plain prompt (a text or token ids)."""
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
        """The continuation in pieces, as it is made."""
        request = complete_request(model, prompt, params)
        return self._stream(lambda stub: stub.StreamComplete, request, _complete_text, timeout_s, request_id, headers)

    async def tokenize(self, model: str, text: str | Messages, *, timeout_s: float | None = None) -> list[int]:
        """The token ids of a text, or of messages under the model's chat template."""
        request = pb.TokenizeRequest(model=model)
        if isinstance(text, str):
            request.text = text
        else:
            request.messages.extend(to_messages(text))
        answer = await self._unary(lambda stub: stub.Tokenize, request, timeout_s)
        return list(answer.token_ids)

    async def detokenize(self, model: str, token_ids: Sequence[int], *, timeout_s: float | None = None) -> str:
        """The text of token ids."""
        request = pb.DetokenizeRequest(model=model, token_ids=token_ids)
        answer = await self._unary(lambda stub: stub.Detokenize, request, timeout_s)
        return answer.text

    async def models(self, *, timeout_s: float | None = None) -> list[pb.Model]:
        """All models that the caller may use, with their state."""
        found: list[pb.Model] = []
        page = ""
        while True:
            answer = await self._unary(lambda stub: stub.ListModels, pb.ListModelsRequest(page_token=page), timeout_s)
            found.extend(answer.models)
            page = answer.next_page_token
            if not page:
                return found

    async def model(self, name: str, *, timeout_s: float | None = None) -> pb.Model:
        """One model by name or alias."""
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
        for others in reversed(range(len(self._options.endpoints))):
            asked = self._gateways.endpoint
            try:
                metadata = self._options.metadata(request_id, headers)
                return await method(self._gateways.stub)(request, timeout=timeout_s, metadata=metadata)
            except grpc.RpcError as error:
                failed = from_rpc(error, endpoint=self._options.endpoint, request_id=request_id)
            if failed.reason != UNREACHABLE:
                raise failed
            self._gateways.turn(asked)
            if not others or not self._options.retries:
                raise failed
        raise AssertionError("there is an endpoint")

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
        resumption = Resumption(options.streamed(request), timeout_s, len(options.endpoints), wanted=options.resume)
        onward = _AsyncResumption(self._gateways, self._sessions, method, resumption, request_id, metadata)
        # headers belong to a call, and a session has one set for all
        call = onward.begin(shared=bool(self._streams) and not headers)
        self._streams += 1
        return AsyncStream(call, request_id, self._options.endpoint, chunk_of, onward, self._stream_ended)

    def _stream_ended(self) -> None:
        self._streams -= 1

    async def _keep_up(self, channel: aio.Channel) -> None:
        """While streams are under way, make a new connection as soon as the gateway gives one up that it drains: a
        stream that it hands on then goes on at once. gRPC itself connects when the next call comes."""
        state = channel.get_state()
        while state is not grpc.ChannelConnectivity.SHUTDOWN:
            await channel.wait_for_state_change(state)
            state = channel.get_state(try_to_connect=bool(self._streams))


def _chat_text(text: str) -> pb.ChatChunk:
    return pb.ChatChunk(choices=[pb.ChoiceDelta(delta=pb.Message(content=text))])


def _complete_text(text: str) -> pb.CompleteChunk:
    return pb.CompleteChunk(choices=[pb.CompleteChoice(text=text)])
