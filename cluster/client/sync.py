"""The client for blocking code. The client uses gRPC's blocking calls and needs no event loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from cluster.client.answers import ChatAnswer, CompleteAnswer, chat_answer, complete_answer
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
from cluster.client.sync_calls import BlockingCalls, Stream
from cluster.v1 import inference_pb2 as pb


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
        self._calls = BlockingCalls(self._options)

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
        self._calls.close()

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
        raw = self._calls.unary(lambda stub: stub.Chat, request, timeout_s, request_id, headers)
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
        return self._calls.stream(lambda stub: stub.StreamChat, request, timeout_s, request_id, headers)

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
        raw = self._calls.unary(lambda stub: stub.Complete, request, timeout_s, request_id, headers)
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
        return self._calls.stream(lambda stub: stub.StreamComplete, request, timeout_s, request_id, headers)

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
        raw = self._calls.unary(lambda stub: stub.Embed, request, timeout_s, request_id, headers)
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
        raw = self._calls.unary(lambda stub: stub.Rerank, request, timeout_s, request_id, headers)
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
        return list(self._calls.unary(lambda stub: stub.Tokenize, request, timeout_s).token_ids)

    def detokenize(self, model: str, token_ids: Sequence[int], *, timeout_s: float | None = None) -> str:
        """Return the text for a sequence of token ids."""
        request = pb.DetokenizeRequest(model=model, token_ids=token_ids)
        return self._calls.unary(lambda stub: stub.Detokenize, request, timeout_s).text

    def models(self, *, timeout_s: float | None = None) -> list[pb.Model]:
        """Return all models that the caller may use, with each model's state."""
        models: list[pb.Model] = []
        page = ""
        while True:
            answer = self._calls.unary(lambda stub: stub.ListModels, pb.ListModelsRequest(page_token=page), timeout_s)
            models.extend(answer.models)
            page = answer.next_page_token
            if not page:
                return models

    def model(self, name: str, *, timeout_s: float | None = None) -> pb.Model:
        """Return the model whose name or alias is `name`."""
        return self._calls.unary(lambda stub: stub.GetModel, pb.GetModelRequest(name=name), timeout_s)
