"""The client for ordinary, blocking code. Built on gRPC's own blocking calls, without an event loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

import grpc

from cluster.client.answers import (
    Account,
    ChatAnswer,
    Chunk,
    CompleteAnswer,
    chat_answer,
    complete_answer,
)
from cluster.client.errors import from_rpc
from cluster.client.options import DEFAULT_TIMEOUT_S, MAX_MESSAGE_BYTES, Options, new_request_id
from cluster.client.requests import ChatParams, Messages, SamplingParams, chat_request, complete_request, to_messages
from cluster.v1 import inference_pb2 as pb
from cluster.v1.inference_pb2_grpc import InferenceStub

Response = TypeVar("Response")


class Stream(Account, Generic[Chunk]):
    """The text of an answer while it is made: iterate it, or `chunks()` for every message of all choices.

    `text`, `finish_reason`, `usage`, `id`, `model` and `request_id` tell what has come so far; usage comes last.
    Leaving a `with` block, `cancel()` or dropping the object ends the call at the gateway.
    """

    def __init__(self, call: Any, request_id: str, endpoint: str) -> None:
        super().__init__(request_id)
        self._call = call
        self._endpoint = endpoint

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
        try:
            chunk: Chunk = next(self._call)
        except grpc.RpcError as error:
            raise from_rpc(error, endpoint=self._endpoint, request_id=self.request_id) from None
        return chunk

    def cancel(self) -> None:
        """End the call now; nothing happens when it has ended."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class Client:
    """A connection to a gateway. Safe to share between threads; `close` it, or use it in a `with` block.

    Every call raises HeadraceError when it fails. `timeout_s` is the deadline of the whole call, which travels with
    it to the engine; `request_id` is made up where none is given. UNAVAILABLE is retried while nothing of the answer
    has arrived.
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
            grpc.secure_channel(self._options.endpoint, credentials, options=arguments)
            if credentials
            else grpc.insecure_channel(self._options.endpoint, options=arguments)
        )
        self._stub = InferenceStub(self._channel)

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
        self._channel.close()

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
        return chat_answer(self._unary(self._stub.Chat, request, timeout_s, request_id, headers), request_id)

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
        return self._stream(self._stub.StreamChat, request, timeout_s, request_id, headers)

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
        return complete_answer(self._unary(self._stub.Complete, request, timeout_s, request_id, headers), request_id)

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
        return self._stream(self._stub.StreamComplete, request, timeout_s, request_id, headers)

    def tokenize(self, model: str, text: str | Messages, *, timeout_s: float | None = None) -> list[int]:
        """The token ids of a text, or of messages under the model's chat template."""
        request = pb.TokenizeRequest(model=model)
        if isinstance(text, str):
            request.text = text
        else:
            request.messages.extend(to_messages(text))
        return list(self._unary(self._stub.Tokenize, request, timeout_s).token_ids)

    def detokenize(self, model: str, token_ids: Sequence[int], *, timeout_s: float | None = None) -> str:
        """The text of token ids."""
        request = pb.DetokenizeRequest(model=model, token_ids=token_ids)
        return self._unary(self._stub.Detokenize, request, timeout_s).text

    def models(self, *, timeout_s: float | None = None) -> list[pb.Model]:
        """All models that the caller may use, with their state."""
        found: list[pb.Model] = []
        page = ""
        while True:
            answer = self._unary(self._stub.ListModels, pb.ListModelsRequest(page_token=page), timeout_s)
            found.extend(answer.models)
            page = answer.next_page_token
            if not page:
                return found

    def model(self, name: str, *, timeout_s: float | None = None) -> pb.Model:
        """One model by name or alias."""
        return self._unary(self._stub.GetModel, pb.GetModelRequest(name=name), timeout_s)

    def _unary(
        self,
        method: Callable[..., Response],
        request: object,
        timeout_s: float | None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        request_id = request_id or new_request_id()
        try:
            return method(
                request,
                timeout=self._options.timeout_s if timeout_s is None else timeout_s,
                metadata=self._options.metadata(request_id, headers),
            )
        except grpc.RpcError as error:
            raise from_rpc(error, endpoint=self._options.endpoint, request_id=request_id) from None

    def _stream(
        self,
        method: Callable[..., Iterator[Chunk]],
        request: object,
        timeout_s: float | None,
        request_id: str | None,
        headers: Mapping[str, str] | None,
    ) -> Stream[Chunk]:
        request_id = request_id or new_request_id()
        call = method(
            request,
            timeout=self._options.timeout_s if timeout_s is None else timeout_s,
            metadata=self._options.metadata(request_id, headers),
        )
        return Stream(call, request_id, self._options.endpoint)
