"""The client for ordinary, blocking code. Built on gRPC's own blocking calls, without an event loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

import grpc

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
from cluster.v1 import inference_pb2 as pb
from cluster.v1.inference_pb2_grpc import InferenceStub

Response = TypeVar("Response")


class Stream(StreamAccount, Generic[Chunk]):
    """The text of an answer while it is made: iterate it, or `chunks()` for every message of all choices.

    `text`, `finish_reason`, `usage`, `id`, `model` and `request_id` tell what has come so far; usage comes last.
    Leaving a `with` block, `cancel()` or dropping the object ends the call at the gateway.
    """

    def __init__(self, call: Any, request_id: str, endpoint: str, onward: _SyncResumption) -> None:
        """`onward` goes on with a call that has broken."""
        super().__init__(request_id)
        self._call = call
        self._endpoint = endpoint
        self._onward = onward
        self._cancelled = threading.Event()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while True:
            text = self._take(self._next())
            if text:
                return text

    def chunks(self) -> Iterator[Chunk]:
        """Every chunk as the API sends it, progress included. Raises HeadraceError."""
        while True:
            try:
                chunk = self._next()
            except StopIteration:
                return
            self._take(chunk)
            yield chunk

    def _next(self) -> Chunk:
        while True:
            try:
                chunk: Any = next(self._call)
            except grpc.RpcError as error:
                failed = from_rpc(error, endpoint=self._endpoint, request_id=self.request_id)
                if not self._go_on(failed):
                    raise failed from None
                continue
            chunk = self._onward.resumption.note(chunk)
            if chunk is not None:
                found: Chunk = chunk
                return found

    def _go_on(self, failed: HeadraceError) -> bool:
        if failed.reason == UNREACHABLE:
            self._onward.leave()
        pause_s = None if self._cancelled.is_set() else self._onward.resumption.pause_s(failed)
        if pause_s is None or self._cancelled.wait(pause_s):
            return False
        self._call = self._onward.again()
        if self._cancelled.is_set():
            self._call.cancel()
        return True

    def cancel(self) -> None:
        """End the call now; nothing happens when it has ended."""
        self._cancelled.set()
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class _SyncResumption:
    """One stream's calls: the first, and those that go on with it."""

    def __init__(
        self,
        gateways: GatewayList[grpc.Channel, InferenceStub],
        method: Callable[[InferenceStub], Callable[..., Any]],
        resumption: Resumption,
        metadata: tuple[tuple[str, str], ...],
    ) -> None:
        """`method` begins."""
        self._gateways = gateways
        self._method = method
        self.resumption = resumption
        self._metadata = metadata
        self._asked = ""

    def begin(self) -> Any:
        """The call."""
        self._asked = self._gateways.endpoint
        method = self._method(self._gateways.stub)
        return method(self.resumption.request, timeout=self.resumption.left_s, metadata=self._metadata)

    def leave(self) -> None:
        """The gateway does not answer: whatever comes next goes to another, where there are several."""
        self._gateways.turn(self._asked)

    def again(self) -> Any:
        """The call that goes on, likewise."""
        self.leave()
        request = self.resumption.resumes
        if request is None:
            return self.begin()
        self._asked = self._gateways.endpoint
        return self._gateways.stub.Resume(request, timeout=self.resumption.left_s, metadata=self._metadata)


class Client:
    """A connection to a gateway. Safe to share between threads; `close` it, or use it in a `with` block.

    Every call raises HeadraceError when it fails. `timeout_s` is the deadline of the whole call, which travels with
    it to the engine; `request_id` is made up where none is given. UNAVAILABLE is retried while nothing of the answer
    has arrived. A stream that breaks goes on by itself, at another gateway where `endpoint` names or resolves to
    several (a list, or with commas between them), unless `resume` is False.
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

        def connect(endpoint: str) -> tuple[grpc.Channel, InferenceStub]:
            channel = (
                grpc.secure_channel(endpoint, credentials, options=arguments)
                if credentials
                else grpc.insecure_channel(endpoint, options=arguments)
            )
            return channel, InferenceStub(channel)

        self._gateways = GatewayList(self._options.endpoints, connect)

    def __repr__(self) -> str:
        return f"Client({self._options.endpoint!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection and every call on it."""
        for channel in self._gateways.channels:
            channel.close()

    def chat(
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
        return chat_answer(self._unary(lambda stub: stub.Chat, request, timeout_s, request_id, headers), request_id)

    def stream_chat(
        self,
        model: str,
        messages: Messages,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        **params: Unpack[ChatParams],
    ) -> Stream[pb.ChatChunk]:
        """The answer in pieces, as it is made."""
        request = chat_request(model, messages, params)
        return self._stream(lambda stub: stub.StreamChat, request, timeout_s, request_id, headers)

    def complete(
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
        raw = self._unary(lambda stub: stub.Complete, request, timeout_s, request_id, headers)
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
    ) -> Stream[pb.CompleteChunk]:
        """The continuation in pieces, as it is made."""
        request = complete_request(model, prompt, params)
        return self._stream(lambda stub: stub.StreamComplete, request, timeout_s, request_id, headers)

    def tokenize(self, model: str, text: str | Messages, *, timeout_s: float | None = None) -> list[int]:
        """The token ids of a text, or of messages under the model's chat template."""
        request = pb.TokenizeRequest(model=model)
        if isinstance(text, str):
            request.text = text
        else:
            request.messages.extend(to_messages(text))
        return list(self._unary(lambda stub: stub.Tokenize, request, timeout_s).token_ids)

    def detokenize(self, model: str, token_ids: Sequence[int], *, timeout_s: float | None = None) -> str:
        """The text of token ids."""
        request = pb.DetokenizeRequest(model=model, token_ids=token_ids)
        return self._unary(lambda stub: stub.Detokenize, request, timeout_s).text

    def models(self, *, timeout_s: float | None = None) -> list[pb.Model]:
        """All models that the caller may use, with their state."""
        found: list[pb.Model] = []
        page = ""
        while True:
            answer = self._unary(lambda stub: stub.ListModels, pb.ListModelsRequest(page_token=page), timeout_s)
            found.extend(answer.models)
            page = answer.next_page_token
            if not page:
                return found

    def model(self, name: str, *, timeout_s: float | None = None) -> pb.Model:
        """One model by name or alias."""
        return self._unary(lambda stub: stub.GetModel, pb.GetModelRequest(name=name), timeout_s)

    def _unary(
        self,
        method: Callable[[InferenceStub], Callable[..., Response]],
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
                return method(self._gateways.stub)(request, timeout=timeout_s, metadata=metadata)
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
        method: Callable[[InferenceStub], Callable[..., Iterator[Chunk]]],
        request: Request,
        timeout_s: float | None,
        request_id: str | None,
        headers: Mapping[str, str] | None,
    ) -> Stream[Chunk]:
        request_id = request_id or new_request_id()
        timeout_s = self._options.timeout_s if timeout_s is None else timeout_s
        options = self._options
        resumption = Resumption(options.streamed(request), timeout_s, len(options.endpoints), wanted=options.resume)
        onward = _SyncResumption(self._gateways, method, resumption, self._options.metadata(request_id, headers))
        return Stream(onward.begin(), request_id, self._options.endpoint, onward)
