"""The OpenAI-compatible HTTP API of a CallService: the endpoints as ASGI applications."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, replace
from typing import Any

from cluster.api.outcomes import OUTCOME_STATUS, CallError, Outcome
from cluster.gateway.apis.http.body import Refused
from cluster.gateway.apis.http.calls import HttpCalls
from cluster.gateway.apis.http.exchange import (
    Application,
    Authenticate,
    Endpoint,
    ErrorAnswer,
    Exchange,
    as_headers,
    by_credentials,
    retry_headers,
    while_connected,
)
from cluster.gateway.apis.http.protocol import CONNECTION
from cluster.gateway.apis.openai import answers
from cluster.gateway.apis.openai.logprobs import ChatLogprobs, CompletionLogprobs
from cluster.gateway.apis.openai.pooling_app import PoolingEndpoints
from cluster.gateway.apis.openai.requests import ParsedRequest, with_caller_names
from cluster.gateway.apis.slices import in_slices, with_commas
from cluster.gateway.apis.whole_logprobs import ChoiceLogprobs, WholeAnswer
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.meta import CallMeta
from cluster.gateway.calls.sequences.pieces import Piece
from cluster.gateway.calls.unread_answers import UnreadAnswer


class OpenAiForm:
    """Error responses and header names of OpenAI's API. Implements ApiForm."""

    request_id_headers: Sequence[bytes] = (b"x-request-id",)
    key_header = b""

    def refused(self, refused: Refused, request_id: str) -> ErrorAnswer:
        """Return the response to a request that did not become a call. Implements ApiForm."""
        return ErrorAnswer(
            refused.status, answers.error_body(str(refused), refused.status, refused.code), refused.headers
        )

    def failed(self, error: CallError, request_id: str) -> ErrorAnswer:
        """Return the response to a call that failed. Implements ApiForm."""
        status = OUTCOME_STATUS[error.outcome].http
        return ErrorAnswer(status, answers.call_error_body(error), retry_headers(error))

    def event(self, error: CallError, request_id: str) -> bytes:
        """Return an error as the last event of a stream that has begun. Implements ApiForm."""
        return answers.error_event(error)


FORM = OpenAiForm()


@dataclass(frozen=True, slots=True)
class _Kind:
    """The encoders of one kind of call: chat or completion."""

    name: str
    stream: type[answers.SseStream]
    object: str
    """The value of the field `object` in a complete answer."""
    choices: Callable[[Sequence[Call], Sequence[Piece]], list[dict[str, Any]]]
    logprobs: Callable[[], ChoiceLogprobs]


_CHAT = _Kind("chat", answers.ChatStream, "chat.completion", answers.chat_choices, ChatLogprobs)
_COMPLETION = _Kind(
    "completion", answers.CompletionStream, "text_completion", answers.completion_choices, CompletionLogprobs
)


class OpenAiApi:
    """The OpenAI-compatible API of a CallService."""

    def __init__(self, calls: HttpCalls, authenticate: Authenticate | None = None) -> None:
        """`authenticate`: used instead of the authentication by API key, JWT or certificate."""
        self._service = calls.service
        self._authenticate = authenticate or by_credentials(calls.service.authenticator)
        self._calls = calls
        self._created = int(time.time())

    def endpoints(self) -> Mapping[str, Application]:
        """Return the endpoints, keyed by path."""
        pooling = PoolingEndpoints(self._calls)

        def endpoint(method: str, answer: Callable[[Exchange], Awaitable[None]]) -> Endpoint:
            return Endpoint(FORM, method, answer, self._authenticate)

        return {
            "/v1/chat/completions": endpoint("POST", lambda exchange: self._call(_CHAT, exchange)),
            "/v1/completions": endpoint("POST", lambda exchange: self._call(_COMPLETION, exchange)),
            "/v1/embeddings": endpoint("POST", pooling.embeddings),
            **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), endpoint("POST", pooling.rerank)),
            **dict.fromkeys(("/score", "/v1/score"), endpoint("POST", pooling.score)),
            "/v1/models": endpoint("GET", self._models),
            "/v1/models/{name:path}": endpoint("GET", self._model),
            "/health": Endpoint(FORM, "GET", self._health),
            "/ready": Endpoint(FORM, "GET", self._ready),
        }

    # ---- calls

    async def _call(self, kind: _Kind, exchange: Exchange) -> None:
        parsed, meta = await self._calls.read(kind.name, exchange)
        if parsed.stream:
            answer = self._stream
        else:
            answer = self._whole if parsed.requests[0].options.logprobs is None else self._whole_with_logprobs
        await while_connected(answer(kind, parsed, meta, exchange), exchange.scope[CONNECTION])

    async def _stream(self, kind: _Kind, parsed: ParsedRequest, meta: CallMeta, exchange: Exchange) -> None:
        async with AsyncExitStack() as stack:
            calls = await self._open(parsed, meta, stack)
            exchange.limit_headers = as_headers(calls[-1].headers)
            stream = kind.stream(
                calls[0].id,
                calls[0].model,
                int(time.time()),
                include_usage=parsed.include_usage,
                continuous_usage=parsed.continuous_usage,
            )
            try:
                n = parsed.requests[0].options.n
                await _run_all([self._stream_call(call, stream, i * n, exchange) for i, call in enumerate(calls)])
            except CallError as error:
                raise with_caller_names(error, parsed.names) from None
        # The calls have released their slots by now, so a client that reads the end slowly holds no slot.
        await exchange.write(stream.end([call.usage for call in calls]), more=False)

    async def _stream_call(self, call: Call, stream: answers.SseStream, shift: int, exchange: Exchange) -> None:
        """Stream the pieces of a call until the end of the call has been sent."""
        encoder = answers.SseEncoder(call, stream, shift, self._service.keepalives.progress)
        await self._calls.stream(call, encoder, exchange)

    async def _whole(self, kind: _Kind, parsed: ParsedRequest, meta: CallMeta, exchange: Exchange) -> None:
        async with AsyncExitStack() as stack:
            calls = await self._open(parsed, meta, stack)
            exchange.limit_headers = as_headers(calls[-1].headers)
            pieces: list[Piece] = []
            for i, call in enumerate(calls):
                try:
                    for piece in await call.output.all_pieces():
                        piece.index += i * parsed.requests[0].options.n
                        pieces.append(piece)
                except CallError as error:
                    raise with_caller_names(error, parsed.names) from None
        choices = kind.choices(calls, pieces)
        answer = answers.whole_answer(kind.object, calls[0].id, calls[0].model, int(time.time()), choices, calls)
        await exchange.respond_once_read(answer, self._service.unread_answers)

    async def _whole_with_logprobs(
        self, kind: _Kind, parsed: ParsedRequest, meta: CallMeta, exchange: Exchange
    ) -> None:
        """Answer as `_whole` does, with log probabilities. The answer may have hundreds of MB."""
        with ExitStack() as counted:
            unread = [
                counted.enter_context(self._service.unread_answers.answer(meta.tenant, waits=not i))
                for i in range(len(parsed.requests))
            ]
            async with AsyncExitStack() as stack:
                calls = await self._open(parsed, meta, stack, unread)
                exchange.limit_headers = as_headers(calls[-1].headers)
                wholes = [WholeAnswer(call, kind.logprobs, one) for call, one in zip(calls, unread, strict=True)]
                try:
                    await _run_all([whole.gather() for whole in wholes])
                except CallError as error:
                    raise with_caller_names(error, parsed.names) from None
            # The calls have released their slots by now, so a client that reads slowly holds no slot.
            pieces = [piece for whole in wholes for piece in whole.pieces]
            for i, piece in enumerate(pieces):
                piece.index = i
            head = {"id": calls[0].id, "object": kind.object, "created": int(time.time()), "model": calls[0].model}
            parts = await answers.answer_with_logprobs(head, kind.choices(calls, pieces), wholes, calls)
            wholes.clear()  # each part is freed once it is sent
            await exchange.respond_in_parts(200, parts, exchange.limit_headers, unread[0] if len(unread) == 1 else None)

    async def _open(
        self, parsed: ParsedRequest, meta: CallMeta, stack: AsyncExitStack, unread: Sequence[UnreadAnswer] = ()
    ) -> list[Call]:
        """Open one call for each prompt of a request. Each call ends when `stack` is closed. Raises CallError, which
        names the prompt. `unread`: counts the answer of each."""
        calls = []
        for i, request in enumerate(parsed.requests):
            try:
                call_meta = meta if i == 0 else replace(meta, counted=False)  # each prompt counts as a request
                calls.append(
                    await stack.enter_async_context(
                        self._service.open(request, call_meta, unread[i] if unread else None)
                    )
                )
            except CallError as error:
                raise with_caller_names(error, parsed.names, i if len(parsed.requests) > 1 else None) from None
        return calls

    # ---- models and health

    async def _models(self, exchange: Exchange) -> None:
        directory, principal = self._service.directory, exchange.principal
        cards = await in_slices(
            answers.body(answers.model_card(target, directory.lookup.aliases(target.model, principal), self._created))
            for target in directory.lookup.targets_of(principal)
        )
        await exchange.respond_in_parts(200, [b'{"object":"list","data":[', *with_commas(cards), b"]}"])

    async def _model(self, exchange: Exchange) -> None:
        directory, principal = self._service.directory, exchange.principal
        target = directory.lookup.target(exchange.scope["path_params"]["name"], principal)
        card = answers.model_card(target, directory.lookup.aliases(target.model, principal), self._created)
        await exchange.respond(200, answers.body(card))

    async def _health(self, exchange: Exchange) -> None:
        """Answer 200 while the process runs."""
        await exchange.respond(200, answers.body({"status": "ok"}))

    async def _ready(self, exchange: Exchange) -> None:
        """Answer 200 while calls are accepted, even if there is no worker, since calls may wait for a worker."""
        if self._service.calls.closing:
            raise CallError(Outcome.NO_WORKER, "this gateway is stopping; call another")
        await exchange.respond(200, answers.body({"status": "ready"}))


async def _run_all(awaitables: Sequence[Awaitable[None]]) -> None:
    """Run all awaitables concurrently. The first error is raised and cancels the other awaitables."""
    if len(awaitables) == 1:
        return await awaitables[0]
    tasks = [asyncio.ensure_future(work) for work in awaitables]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
