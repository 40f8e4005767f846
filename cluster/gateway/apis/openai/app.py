"""The OpenAI-compatible HTTP API of a CallService, as an ASGI application.

The pieces of a stream bypass ASGI: a StreamWriter writes the pieces directly to the connection. A streamed response
starts with the first piece or keep-alive comment, so a call that fails earlier is answered with the status code of the
error. HTTP has no deadlines; instead a call is cancelled as soon as the client disconnects.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from email.utils import formatdate
from functools import partial
from typing import Any, Protocol

import structlog
from starlette.routing import Route, Router

from cluster.api.outcomes import OUTCOME_STATUS, CallError, Outcome
from cluster.gateway.apis.http.body import Refused, RequestBodies
from cluster.gateway.apis.http.protocol import CONNECTION
from cluster.gateway.apis.openai import answers
from cluster.gateway.apis.openai.requests import ParsedRequest, with_caller_names
from cluster.gateway.apis.request_ids import random_id, request_id, traceparent
from cluster.gateway.auth.authenticator import DEFAULT_PRINCIPAL, Authenticator, Credentials, alternative_names
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.meta import CallMeta
from cluster.gateway.calls.sequence import Piece
from cluster.gateway.calls.stream_writer import ChunkDelivery, StreamWriter, Transport
from cluster.gateway.service import CallService

log = structlog.get_logger("http")

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ClientConnection(Transport, Protocol):
    """The connection on which a request came. The server puts the connection into the ASGI scope of the request."""

    transport: Any

    def watch(self, lost: Callable[[], None]) -> None:
        """Call `lost` once the client is gone. If the client is gone already, call `lost` soon."""

    def unwatch(self, lost: Callable[[], None]) -> None:
        """Stop calling `lost`."""

    def mark_authenticated(self) -> None:
        """Record that the client presented a valid credential."""

    def charge_refusal(self) -> None:
        """Count a refused request."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """The encoders of one kind of call: chat or completion."""

    name: str
    stream: type[answers.SseStream]
    answer: Callable[[str, str, int, Sequence[Call], Sequence[Piece]], bytes]


_CHAT = _Kind("chat", answers.ChatStream, answers.chat_answer)
_COMPLETION = _Kind("completion", answers.CompletionStream, answers.completion_answer)


class Exchange:
    """An HTTP request and the response to the request."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.receive = receive
        self.send = send
        self.started = False
        self.principal = DEFAULT_PRINCIPAL
        self.limit_headers: list[tuple[bytes, bytes]] = []
        """Headers that hold the caller's rate limits, for a successful answer."""
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.request_id = request_id(self.header(b"x-request-id")) or random_id()

    def header(self, name: bytes) -> str:
        """Return the value of a header; "" if the header is absent."""
        return self.headers.get(name, b"").decode("latin-1")

    def credentials(self, certificates: bool) -> Credentials:
        """Return the credentials that the caller presents. `certificates`: whether client certificates are accepted; if
        so, the credentials include the names in the caller's certificate."""
        authorization = tuple(v.decode("latin-1") for name, v in self.scope["headers"] if name == b"authorization")
        host, port = self.scope.get("client") or ("", 0)
        tls = self.scope[CONNECTION].transport.get_extra_info("ssl_object") if certificates else None
        names = alternative_names(tls.getpeercert()) if tls is not None else ()
        return Credentials(authorization, names, f"{host}:{port}")

    async def start(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Send the status and the headers of the response."""
        self.started = True
        common = [(b"date", formatdate(usegmt=True).encode()), (b"x-request-id", self.request_id.encode())]
        await self.send({"type": "http.response.start", "status": status, "headers": [*common, *headers]})

    async def write(self, part: bytes, more: bool = True) -> None:
        """Send a part of an event stream. The first call of this method starts the response."""
        if not self.started:
            await self.start(200, [*_EVENTS, *self.limit_headers])
        await self.send({"type": "http.response.body", "body": part, "more_body": more})

    async def respond(self, status: int, content: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """Send a complete JSON response."""
        length = (b"content-length", b"%d" % len(content))
        await self.start(status, [(b"content-type", b"application/json"), length, *headers])
        await self.send({"type": "http.response.body", "body": content, "more_body": False})

    async def fail(self, error: CallError) -> None:
        """Send the error of a call: as the response, or as an event if the stream has begun."""
        if self.started:
            await self.write(answers.error_event(error), more=False)
        else:
            status = OUTCOME_STATUS[error.outcome].http
            headers = answers.retry_headers(error)
            if status == 401:
                headers.append((b"www-authenticate", b"Bearer"))
            await self.respond(status, answers.call_error_body(error), headers)


class _Endpoint:
    """The ASGI application of one route. It checks the HTTP method and maps errors to responses.

    If there is an `authenticator`, the caller is authenticated before the body is read.
    """

    def __init__(
        self, method: str, answer: Callable[[Exchange], Awaitable[None]], authenticator: Authenticator | None = None
    ) -> None:
        self._authenticator = authenticator
        self._methods = ("GET", "HEAD") if method == "GET" else (method,)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        try:
            if scope["method"] not in self._methods:
                allow = [(b"allow", ", ".join(self._methods).encode())]
                raise Refused(405, "method_not_allowed", f"use {self._methods[0]} on {scope['path']}", allow)
            if self._authenticator is not None:
                exchange.principal = await self._authenticator.principal(
                    exchange.credentials(self._authenticator.by_certificate)
                )
                scope[CONNECTION].mark_authenticated()
            await self._answer(exchange)
        except ConnectionResetError:
            return
        except Refused as refused:
            scope[CONNECTION].charge_refusal()
            content = answers.error_body(str(refused), refused.status, refused.code)
            await exchange.respond(refused.status, content, refused.headers)
        except CallError as error:
            scope[CONNECTION].charge_refusal()
            await exchange.fail(error)
        except Exception:  # callers get no traceback; the log has it under the request id
            log.exception("unexpected", request_id=exchange.request_id)
            message = f"unexpected failure; quote request id {exchange.request_id}"
            await exchange.fail(CallError(Outcome.INTERNAL, message))


class OpenAiApi:
    """The OpenAI-compatible API of a CallService."""

    def __init__(self, service: CallService, bodies: RequestBodies) -> None:
        self._service = service
        self._bodies = bodies
        self._created = int(time.time())
        self._delivery: ChunkDelivery | None = None

    def app(self) -> Application:
        """Return the ASGI application with all routes."""
        authenticator = self._service.authenticator
        endpoints = {
            "/v1/chat/completions": _Endpoint("POST", lambda exchange: self._call(_CHAT, exchange), authenticator),
            "/v1/completions": _Endpoint("POST", lambda exchange: self._call(_COMPLETION, exchange), authenticator),
            "/v1/models": _Endpoint("GET", self._models, authenticator),
            "/v1/models/{name:path}": _Endpoint("GET", self._model, authenticator),
            "/health": _Endpoint("GET", self._health),
            "/ready": _Endpoint("GET", self._ready),
        }
        routes = [Route(path, endpoint, name=path) for path, endpoint in endpoints.items()]
        router = Router(routes, redirect_slashes=False, default=_not_found)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            """Look up the path in the table before the router is asked. The router tries one expression after the
            other, and most paths need no expression."""
            endpoint = endpoints.get(scope.get("path", "")) if scope["type"] == "http" else None
            await (endpoint or router)(scope, receive, send)

        return app

    # ---- calls

    async def _call(self, kind: _Kind, exchange: Exchange) -> None:
        media_type = exchange.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if media_type != b"application/json":  # also prevents cross-site form posts
            raise Refused(415, "unsupported_media_type", "content-type must be application/json")
        connection = exchange.scope[CONNECTION]
        trace = traceparent(exchange.header(b"traceparent"))
        meta = CallMeta(exchange.request_id, "http", traceparent=trace, principal=exchange.principal)
        meta = await self._service.count(meta)
        length = exchange.headers.get(b"content-length", b"")
        async with self._bodies.read(exchange.receive, connection, length, meta.tenant) as content:
            max_ids = partial(self._service.tokenization.longest_context, meta.principal)
            parsed = await self._service.bodies.http(kind.name, content, meta.tenant, max_ids)
        answer = self._stream if parsed.stream else self._whole
        await _while_connected(answer(kind, parsed, meta, exchange), connection)

    async def _stream(self, kind: _Kind, parsed: ParsedRequest, meta: CallMeta, exchange: Exchange) -> None:
        async with AsyncExitStack() as stack:
            calls = await self._open(parsed, meta, stack)
            exchange.limit_headers = answers.as_headers(calls[-1].headers)
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
        while not exchange.started:
            await call.news()
            if data := encoder.encode_new():
                await exchange.write(data)
                if encoder.ended:
                    return
        if self._delivery is None:
            self._delivery = ChunkDelivery()
        await StreamWriter(call, encoder, exchange.scope[CONNECTION], self._delivery).run()

    async def _whole(self, kind: _Kind, parsed: ParsedRequest, meta: CallMeta, exchange: Exchange) -> None:
        async with AsyncExitStack() as stack:
            calls = await self._open(parsed, meta, stack)
            exchange.limit_headers = answers.as_headers(calls[-1].headers)
            pieces: list[Piece] = []
            for i, call in enumerate(calls):
                try:
                    for piece in await call.all_pieces():
                        piece.index += i * parsed.requests[0].options.n
                        pieces.append(piece)
                except CallError as error:
                    raise with_caller_names(error, parsed.names) from None
        answer = kind.answer(calls[0].id, calls[0].model, int(time.time()), calls, pieces)
        await exchange.respond(200, answer, exchange.limit_headers)

    async def _open(self, parsed: ParsedRequest, meta: CallMeta, stack: AsyncExitStack) -> list[Call]:
        """Open one call for each prompt of a request. Raises CallError, which names the prompt."""
        calls = []
        for i, request in enumerate(parsed.requests):
            try:
                call_meta = meta if i == 0 else replace(meta, counted=False)  # each prompt counts as a request
                calls.append(await stack.enter_async_context(self._service.open(request, call_meta)))
            except CallError as error:
                raise with_caller_names(error, parsed.names, i if len(parsed.requests) > 1 else None) from None
        return calls

    # ---- models and health

    async def _models(self, exchange: Exchange) -> None:
        directory, principal = self._service.directory, exchange.principal
        cards = [
            answers.model_card(model, directory.aliases(model, principal), self._created)
            for model in directory.open_to(principal)
        ]
        await exchange.respond(200, answers.body({"object": "list", "data": cards}))

    async def _model(self, exchange: Exchange) -> None:
        directory, principal = self._service.directory, exchange.principal
        model = directory.resolve(exchange.scope["path_params"]["name"], principal)
        await exchange.respond(
            200, answers.body(answers.model_card(model, directory.aliases(model, principal), self._created))
        )

    async def _health(self, exchange: Exchange) -> None:
        """Answer 200 while the process runs."""
        await exchange.respond(200, answers.body({"status": "ok"}))

    async def _ready(self, exchange: Exchange) -> None:
        """Answer 200 while calls are accepted, even if there is no worker, since calls may wait for a worker."""
        if self._service.calls.closing:
            raise CallError(Outcome.NO_WORKER, "this gateway is stopping; call another")
        await exchange.respond(200, answers.body({"status": "ready"}))


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":  # a WebSocket: closed before it is accepted
        await send({"type": "websocket.close", "code": 1000})
        return
    scope[CONNECTION].charge_refusal()
    exchange = Exchange(scope, receive, send)
    content = answers.error_body(f"there is nothing at {scope['path']}", 404, "not_found")
    await exchange.respond(404, content)


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


async def _while_connected(work: Awaitable[None], connection: ClientConnection) -> None:
    """Await `work`. If the client disconnects, cancel `work` and raise ConnectionResetError."""
    task, gone = asyncio.current_task(), False

    def lost() -> None:
        nonlocal gone
        if not gone and task is not None:
            gone = True
            task.cancel()

    connection.watch(lost)
    try:
        await work
    except asyncio.CancelledError:
        if not gone or (task is not None and task.uncancel()):  # cancelled for another reason
            raise
        raise ConnectionResetError from None
    finally:
        connection.unwatch(lost)
