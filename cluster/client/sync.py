"""The client for blocking code. The client uses gRPC's blocking calls and needs no event loop."""

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
    StreamState,
    chat_answer,
    complete_answer,
)
from cluster.client.attempts import StreamAttempts
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
from cluster.v1 import inference_pb2 as pb
from cluster.v1.inference_pb2_grpc import InferenceStub

Response = TypeVar("Response")


class Stream(StreamState, Generic[Chunk]):
    """A streamed answer.

    Iterate over the stream to read the first choice's text. Iterate over `chunks()` to read every message of all
    choices. `text`, `finish_reason`, `usage`, `id`, `model` and `request_id` have the values received so far; the
    usage is received last. Leaving a `with` block, calling `cancel()` or dropping the stream object ends the call at
    the gateway.
    """

    def __init__(self, attempts: StreamAttempts, endpoint: str) -> None:
        """Initialize the stream of a started call. Errors name `endpoint`."""
        super().__init__(attempts.request_id)
        self._endpoint = endpoint
        self._attempts = attempts
        self._cancelled = threading.Event()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while True:
            text = self._record(self._next())
            if text:
                return text

    def chunks(self) -> Iterator[Chunk]:
        """Yield every chunk in the form of the API, including progress messages. Raises HeadraceError."""
        while True:
            try:
                chunk = self._next()
            except StopIteration:
                return
            self._record(chunk)
            yield chunk

    def _next(self) -> Chunk:
        attempts = self._attempts
        while True:
            try:
                chunk: Any = next(attempts.call)
            except grpc.RpcError as error:
                failed = from_rpc(error, endpoint=self._endpoint, request_id=self.request_id)
                if not self._resume(failed):
                    raise failed from None
                continue
            chunk = attempts.resumption.record(chunk)
            if chunk is not None:
                typed: Chunk = chunk
                return typed

    def _resume(self, failed: HeadraceError) -> bool:
        pause_s = self._attempts.pause_after(failed)
        if pause_s is None or self._cancelled.wait(pause_s):
            return False
        self._attempts.resume()
        if self._cancelled.is_set():
            self._attempts.call.cancel()
        return True

    def cancel(self) -> None:
        """End the call now. Does nothing if the call has ended."""
        self._cancelled.set()
        self._attempts.call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class Client:
    """A connection to a gateway. Thread-safe. Call `close` at the end, or use a `with` block.

    A failed call raises HeadraceError. `timeout_s` is the deadline of the whole call, and the gateway passes the
    deadline on to the engine. `request_id` is generated if the caller gives none. A call that fails with UNAVAILABLE
    is retried if no part of the answer has arrived.

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
        """Close the connection and end all calls on the connection."""
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
        """Return the whole answer to a prompt (a string) or to a conversation."""
        request_id = request_id or new_request_id()
        request = chat_request(model, messages, params)
        raw = self._unary(lambda stub: stub.Chat, request, timeout_s, request_id, headers)
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
    ) -> Stream[pb.ChatChunk]:
        """Return the answer to a prompt (a string) or to a conversation, as a stream."""
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
        """Return the whole continuation of a plain prompt (a text or token ids)."""
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
        """Return the continuation of a plain prompt (a text or token ids), as a stream."""
        request = complete_request(model, prompt, params)
        return self._stream(lambda stub: stub.StreamComplete, request, timeout_s, request_id, headers)

    def embed(
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
        raw = self._unary(lambda stub: stub.Embed, request, timeout_s, request_id, headers)
        return embed_answer(raw, request_id)

    def rerank(
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
        raw = self._unary(lambda stub: stub.Rerank, request, timeout_s, request_id, headers)
        return rerank_answer(raw, request_id)

    def tokenize(
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
        return list(self._unary(lambda stub: stub.Tokenize, request, timeout_s).token_ids)

    def detokenize(self, model: str, token_ids: Sequence[int], *, timeout_s: float | None = None) -> str:
        """Return the text for a sequence of token ids."""
        request = pb.DetokenizeRequest(model=model, token_ids=token_ids)
        return self._unary(lambda stub: stub.Detokenize, request, timeout_s).text

    def models(self, *, timeout_s: float | None = None) -> list[pb.Model]:
        """Return all models that the caller may use, with each model's state."""
        models: list[pb.Model] = []
        page = ""
        while True:
            answer = self._unary(lambda stub: stub.ListModels, pb.ListModelsRequest(page_token=page), timeout_s)
            models.extend(answer.models)
            page = answer.next_page_token
            if not page:
                return models

    def model(self, name: str, *, timeout_s: float | None = None) -> pb.Model:
        """Return the model whose name or alias is `name`."""
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
        for remaining in reversed(range(len(self._options.endpoints))):
            endpoint = self._gateways.endpoint
            try:
                metadata = self._options.metadata(request_id, headers)
                return method(self._gateways.stub)(request, timeout=timeout_s, metadata=metadata)
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
        method: Callable[[InferenceStub], Callable[..., Iterator[Chunk]]],
        request: Request,
        timeout_s: float | None,
        request_id: str | None,
        headers: Mapping[str, str] | None,
    ) -> Stream[Chunk]:
        request_id = request_id or new_request_id()
        resumption, metadata = self._options.resumption(request, timeout_s), self._options.metadata(request_id, headers)
        attempts = StreamAttempts(self._gateways, method, resumption, request_id, metadata)
        attempts.start()
        return Stream(attempts, self._options.endpoint)
