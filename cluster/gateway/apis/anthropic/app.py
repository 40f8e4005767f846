"""Anthropic's Messages API over HTTP: ASGI applications that make calls to a CallService."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final
from urllib.parse import parse_qs

from cluster.api.outcomes import CallError, invalid, quoted
from cluster.gateway.apis.anthropic import answers
from cluster.gateway.apis.anthropic.errors import FORM, with_messages_names
from cluster.gateway.apis.anthropic.stream import MessageEncoder
from cluster.gateway.apis.http.calls import HttpCalls
from cluster.gateway.apis.http.exchange import (
    Application,
    Endpoint,
    Exchange,
    Receive,
    Scope,
    Send,
    as_headers,
    by_credentials,
    while_connected,
)
from cluster.gateway.apis.http.protocol import CONNECTION
from cluster.gateway.apis.openai.answers import body
from cluster.gateway.apis.openai.requests import ParsedRequest
from cluster.gateway.apis.slices import in_slices
from cluster.gateway.calls.meta import CallMeta

VERSION_HEADER: Final = b"anthropic-version"
"""Header that every client of Anthropic's API sends."""
MESSAGES: Final = "/v1/messages"
COUNT_TOKENS: Final = "/v1/messages/count_tokens"
DEFAULT_PAGE, LARGEST_PAGE = 20, 1000
LIFECYCLES: Final = ("active", "deprecated", "retired")
_MAX_QUERY_BYTES: Final = 8192
_LIMIT_DIGITS: Final = 4


class AnthropicApi:
    """Anthropic's API. Requests become calls to a CallService."""

    def __init__(self, calls: HttpCalls) -> None:
        self._service = calls.service
        self._calls = calls
        self._created = time.time()

    def endpoints(self) -> Mapping[str, Application]:
        """Return the endpoints, keyed by path. The paths for models are also paths of OpenAI's API."""
        authenticate = by_credentials(self._service.authenticator)

        def endpoint(method: str, answer: Callable[[Exchange], Awaitable[None]]) -> Endpoint:
            return Endpoint(FORM, method, answer, authenticate)

        return {
            MESSAGES: endpoint("POST", self._messages),
            COUNT_TOKENS: endpoint("POST", self._count_tokens),
            "/v1/models": endpoint("GET", self._models),
            "/v1/models/{name:path}": endpoint("GET", self._model),
        }

    # ---- messages

    async def _messages(self, exchange: Exchange) -> None:
        parsed, meta = await self._calls.read("messages", exchange)
        answer = self._stream if parsed.stream else self._whole
        await while_connected(answer(parsed, meta, exchange), exchange.scope[CONNECTION])

    async def _stream(self, parsed: ParsedRequest, meta: CallMeta, exchange: Exchange) -> None:
        try:
            async with self._service.open(parsed.requests[0], meta) as call:
                exchange.limit_headers = as_headers(call.headers)
                encoder = MessageEncoder(call, self._service.keepalives.progress)
                await self._calls.stream(call, encoder, exchange)
        except CallError as error:
            raise with_messages_names(error, parsed.names) from None
        # The call has released its slot by now, so a client that reads the end slowly holds no slot.
        await exchange.write(encoder.end(), more=False)

    async def _whole(self, parsed: ParsedRequest, meta: CallMeta, exchange: Exchange) -> None:
        try:
            async with self._service.open(parsed.requests[0], meta) as call:
                exchange.limit_headers = as_headers(call.headers)
                (piece,) = await call.output.all_pieces()
        except CallError as error:
            raise with_messages_names(error, parsed.names) from None
        message = answers.whole_message(answers.message_head(call), call.usage, answers.tool_ids(call), piece)
        await exchange.respond_once_read(body(message), self._service.unread_answers)

    async def _count_tokens(self, exchange: Exchange) -> None:
        parsed, meta = await self._calls.read("count_tokens", exchange)
        await while_connected(self._count(parsed, meta, exchange), exchange.scope[CONNECTION])

    async def _count(self, parsed: ParsedRequest, meta: CallMeta, exchange: Exchange) -> None:
        request = parsed.requests[0]
        try:
            ids, _ = await self._service.tokenization.tokenize(request.model, request.prompt, meta)
        except CallError as error:
            raise with_messages_names(error, parsed.names) from None
        await exchange.respond(200, body({"input_tokens": len(ids)}))

    # ---- models

    async def _models(self, exchange: Exchange) -> None:
        query = _query(exchange.scope.get("query_string", b""))
        limit, after, before = _page(query)
        open_models = self._service.directory.lookup.targets_of(exchange.principal) if _lists_active(query) else ()
        infos = await in_slices(answers.model_info(target, self._created) for target in open_models)
        await exchange.respond(200, body(answers.page_of(infos, limit, after, before)))

    async def _model(self, exchange: Exchange) -> None:
        name = exchange.scope["path_params"]["name"]
        target = self._service.directory.lookup.target(name, exchange.principal)
        await exchange.respond(200, body(answers.model_info(target, self._created)))


def _query(query: bytes) -> Mapping[str, Sequence[str]]:
    """Return the parameters in the query string of a list request, by name. Raises CallError."""
    if len(query) > _MAX_QUERY_BYTES:
        raise invalid("query", f"must not be longer than {_MAX_QUERY_BYTES} bytes")
    return parse_qs(query.decode("latin-1"))


def _lists_active(query: Mapping[str, Sequence[str]]) -> bool:
    """Return whether a list request asks for models in the lifecycle stage `active`. All models of this server are in
    that stage. Raises CallError."""
    wanted = [*query.get("lifecycle", ()), *query.get("lifecycle[]", ())]
    for stage in wanted:
        if stage not in LIFECYCLES:
            raise invalid("lifecycle", f"must be one of {', '.join(LIFECYCLES)}; got {quoted(stage)}")
    return not wanted or answers.LIFECYCLE in wanted


def _page(query: Mapping[str, Sequence[str]]) -> tuple[int, str, str]:
    """Return the parameters `limit`, `after_id` and `before_id` of a list request. Raises CallError."""
    limit, after, before = (query.get(name, [""])[-1] for name in ("limit", "after_id", "before_id"))
    if not limit:
        return DEFAULT_PAGE, after, before
    digits = limit.isascii() and limit.isdigit() and len(limit) <= _LIMIT_DIGITS
    if not digits or not 1 <= int(limit) <= LARGEST_PAGE:
        raise invalid("limit", f"must be a whole number from 1 to {LARGEST_PAGE}")
    return int(limit), after, before


class ByVersion:
    """The ASGI application for a path that two APIs share. `anthropic` answers a request that has Anthropic's version
    header or a path below /v1/messages; `other` answers all other requests."""

    def __init__(self, anthropic: Application, other: Application) -> None:
        self._anthropic = anthropic
        self._other = other

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        below = scope.get("path", "").startswith(f"{MESSAGES}/")
        named = below or any(name == VERSION_HEADER for name, _ in scope.get("headers", ()))
        await (self._anthropic if named else self._other)(scope, receive, send)
