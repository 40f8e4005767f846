"""OpenAI's HTTP API over the CallService: the other codec of the one service.

An ASGI application; only the pieces of a stream pass by it, through http_relay. A response starts with its first
piece or its first sign of life, so that whatever fails before has its own status code. HTTP has no deadlines; instead
a client that goes away ends its call at once, wherever it is.
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

from cluster.api.outcomes import FAULTS, CallError, Outcome
from cluster.gateway.apis.http.body import Refused, RequestBodies
from cluster.gateway.apis.http.protocol import CONNECTION
from cluster.gateway.apis.openai import answers
from cluster.gateway.apis.openai.requests import ParsedRequest, as_asked
from cluster.gateway.apis.request_ids import random_id, request_id, traceparent
from cluster.gateway.auth.authenticator import ANYBODY, Authenticator, Credentials, alternative_names
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
    """What the server puts there."""

    transport: Any

    def watch(self, lost: Callable[[], None]) -> None:
        """Call this once the client is gone, or soon where it is gone already."""

    def unwatch(self, lost: Callable[[], None]) -> None:
        """No longer."""

    def prove(self) -> None:
        """The client has shown a credential that was accepted."""

    def charge_refusal(self) -> None:
        """A request is about to be refused."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """What differs between chat and completion."""

    name: str
    stream: type[answers.SseStream]
    answer: Callable[[str, str, int, Sequence[Call], Sequence[Piece]], bytes]


_CHAT = _Kind("chat", answers.ChatStream, answers.chat_answer)
_COMPLETION = _Kind("completion", answers.CompletionStream, answers.completion_answer)


class Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.receive = receive
        self.send = send
        self.started = False
        self.principal = ANYBODY
        self.standing: list[tuple[bytes, bytes]] = []
        """Headers of how the caller's limits stand, for an answer that is no error."""
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.request_id = request_id(self.header(b"x-request-id")) or random_id()

    def header(self, name: bytes) -> str:
        """A header's value; empty where there is none."""
        return self.headers.get(name, b"").decode("latin-1")

    def shown(self, certificates: bool) -> Credentials:
        """What the caller shows; its certificate where `certificates` count."""
        authorization = tuple(v.decode("latin-1") for name, v in self.scope["headers"] if name == b"authorization")
        host, port = self.scope.get("client") or ("", 0)
        tls = self.scope[CONNECTION].transport.get_extra_info("ssl_object") if certificates else None
        names = alternative_names(tls.getpeercert()) if tls is not None else ()
        return Credentials(authorization, names, f"{host}:{port}")

    async def start(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Status and headers."""
        self.started = True
        common = [(b"date", formatdate(usegmt=True).encode()), (b"x-request-id", self.request_id.encode())]
        await self.send({"type": "http.response.start", "status": status, "headers": [*common, *headers]})

    async def write(self, part: bytes, more: bool = True) -> None:
        """A part of a stream of events; the first begins it."""
        if not self.started:
            await self.start(200, [*_EVENTS, *self.standing])
        await self.send({"type": "http.response.body", "body": part, "more_body": more})

    async def whole(self, status: int, content: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """A whole JSON response."""
        length = (b"content-length", b"%d" % len(content))
        await self.start(status, [(b"content-type", b"application/json"), length, *headers])
        await self.send({"type": "http.response.body", "body": content, "more_body": False})

    async def fail(self, error: CallError) -> None:
        """A call's error: as the response, or within a stream that has begun."""
        if self.started:
            await self.write(answers.error_event(error), more=False)
        else:
            status = FAULTS[error.outcome].http
            headers = answers.retry_headers(error)
            if status == 401:
                headers.append((b"www-authenticate", b"Bearer"))
            await self.whole(status, answers.call_error_body(error), headers)


class _Endpoint:
    """A route's ASGI application: the methods it takes, and the one place where errors become responses.

    With a `door` who calls is asked before the body is read.
    """

    def __init__(
        self, method: str, answer: Callable[[Exchange], Awaitable[None]], door: Authenticator | None = None
    ) -> None:
        self._door = door
        self._methods = ("GET", "HEAD") if method == "GET" else (method,)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        try:
            if scope["method"] not in self._methods:
                allow = [(b"allow", ", ".join(self._methods).encode())]
                raise Refused(405, "method_not_allowed", f"use {self._methods[0]} on {scope['path']}", allow)
            if self._door is not None:
                exchange.principal = await self._door.principal(exchange.shown(self._door.by_certificate))
                scope[CONNECTION].prove()
            await self._answer(exchange)
        except ConnectionResetError:
            return
        except Refused as refused:
            scope[CONNECTION].charge_refusal()
            content = answers.error_body(str(refused), refused.status, refused.code)
            await exchange.whole(refused.status, content, refused.headers)
        except CallError as error:
            scope[CONNECTION].charge_refusal()
            await exchange.fail(error)
        except Exception:  # no traceback reaches a caller; it is in the log under the request's id
            log.exception("unexpected", request_id=exchange.request_id)
            message = f"unexpected failure; quote request id {exchange.request_id}"
            await exchange.fail(CallError(Outcome.INTERNAL, message))


class OpenAiApi:
    """The HTTP face of a CallService, as an ASGI application."""

    def __init__(self, service: CallService, bodies: RequestBodies) -> None:
        self._service = service
        self._bodies = bodies
        self._created = int(time.time())
        self._relay: ChunkDelivery | None = None

    def app(self) -> Application:
        """All routes."""
        door = self._service.door
        endpoints = {
            "/v1/chat/completions": _Endpoint("POST", lambda exchange: self._call(_CHAT, exchange), door),
            "/v1/completions": _Endpoint("POST", lambda exchange: self._call(_COMPLETION, exchange), door),
            "/v1/models": _Endpoint("GET", self._models, door),
            "/v1/models/{name:path}": _Endpoint("GET", self._model, door),
            "/health": _Endpoint("GET", self._health),
            "/ready": _Endpoint("GET", self._ready),
        }
        routes = [Route(path, endpoint, name=path) for path, endpoint in endpoints.items()]
        router = Router(routes, redirect_slashes=False, default=_nowhere)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            """The router asks its expressions in turn; most paths need none."""
            endpoint = endpoints.get(scope.get("path", "")) if scope["type"] == "http" else None
            await (endpoint or router)(scope, receive, send)

        return app

    # ---- calls

    async def _call(self, kind: _Kind, exchange: Exchange) -> None:
        media_type = exchange.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if media_type != b"application/json":  # also what keeps other sites' pages from posting here unasked
            raise Refused(415, "unsupported_media_type", "content-type must be application/json")
        connection = exchange.scope[CONNECTION]
        trace = traceparent(exchange.header(b"traceparent"))
        meta = CallMeta(exchange.request_id, "http", traceparent=trace, principal=exchange.principal)
        meta = await self._service.count(meta)
        length = exchange.headers.get(b"content-length", b"")
        async with self._bodies.read(exchange.receive, connection, length, meta.tenant) as content:
            most_ids = partial(self._service.longest_context, meta.principal)
            asked = await self._service.bodies.http(kind.name, content, meta.tenant, most_ids)
        answer = self._stream if asked.stream else self._whole
        await _while_connected(answer(kind, asked, meta, exchange), connection)

    async def _stream(self, kind: _Kind, asked: ParsedRequest, meta: CallMeta, exchange: Exchange) -> None:
        async with AsyncExitStack() as stack:
            calls = await self._open(asked, meta, stack)
            exchange.standing = answers.as_headers(calls[-1].headers)
            stream = kind.stream(
                calls[0].id,
                calls[0].model,
                int(time.time()),
                include_usage=asked.include_usage,
                continuous_usage=asked.continuous_usage,
            )
            try:
                n = asked.wishes[0].options.n
                await _all([self._relay_call(call, stream, i * n, exchange) for i, call in enumerate(calls)])
            except CallError as error:
                raise as_asked(error, asked.names) from None
        # The calls' places are free by now, however slowly the end is read.
        await exchange.write(stream.end([call.usage for call in calls]), more=False)

    async def _relay_call(self, call: Call, stream: answers.SseStream, shift: int, exchange: Exchange) -> None:
        """Send a call's pieces as they come, until its end has been told."""
        voice = answers.SseEncoder(call, stream, shift, self._service.progress)
        while not exchange.started:
            await call.news()
            if data := voice.take():
                await exchange.write(data)
                if voice.ended:
                    return
        if self._relay is None:
            self._relay = ChunkDelivery()
        await StreamWriter(call, voice, exchange.scope[CONNECTION], self._relay).run()

    async def _whole(self, kind: _Kind, asked: ParsedRequest, meta: CallMeta, exchange: Exchange) -> None:
        async with AsyncExitStack() as stack:
            calls = await self._open(asked, meta, stack)
            exchange.standing = answers.as_headers(calls[-1].headers)
            pieces: list[Piece] = []
            for i, call in enumerate(calls):
                try:
                    for piece in await _ended(call):
                        piece.index += i * asked.wishes[0].options.n
                        pieces.append(piece)
                except CallError as error:
                    raise as_asked(error, asked.names) from None
        answer = kind.answer(calls[0].id, calls[0].model, int(time.time()), calls, pieces)
        await exchange.whole(200, answer, exchange.standing)

    async def _open(self, asked: ParsedRequest, meta: CallMeta, stack: AsyncExitStack) -> list[Call]:
        """One running call for each prompt."""
        calls = []
        for i, wish in enumerate(asked.wishes):
            try:
                of_this = meta if i == 0 else replace(meta, counted=False)  # each prompt is a request
                calls.append(await stack.enter_async_context(self._service.open(wish, of_this)))
            except CallError as error:
                raise as_asked(error, asked.names, i if len(asked.wishes) > 1 else None) from None
        return calls

    # ---- models and health

    async def _models(self, exchange: Exchange) -> None:
        directory, who = self._service.directory, exchange.principal
        cards = [
            answers.model_card(model, directory.aliases(model, who), self._created) for model in directory.open_to(who)
        ]
        await exchange.whole(200, answers.body({"object": "list", "data": cards}))

    async def _model(self, exchange: Exchange) -> None:
        directory, who = self._service.directory, exchange.principal
        model = directory.resolve(exchange.scope["path_params"]["name"], who)
        await exchange.whole(200, answers.body(answers.model_card(model, directory.aliases(model, who), self._created)))

    async def _health(self, exchange: Exchange) -> None:
        """The process lives."""
        await exchange.whole(200, answers.body({"status": "ok"}))

    async def _ready(self, exchange: Exchange) -> None:
        """Calls are taken, whether or not a worker is linked: they may wait here for one."""
        if self._service.closing:
            raise CallError(Outcome.NO_WORKER, "this gateway is stopping; call another")
        await exchange.whole(200, answers.body({"status": "ready"}))


async def _nowhere(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":  # a WebSocket: closed before it is accepted
        await send({"type": "websocket.close", "code": 1000})
        return
    scope[CONNECTION].charge_refusal()
    exchange = Exchange(scope, receive, send)
    content = answers.error_body(f"there is nothing at {scope['path']}", 404, "not_found")
    await exchange.whole(404, content)


async def _ended(call: Call) -> list[Piece]:
    """All pieces of a call that has ended. Raises its error, whatever text came before it."""
    while not call.finished and call.error is None:
        await call.news()
    pieces = call.take()
    if call.error is not None:
        raise call.error
    return pieces


async def _all(works: Sequence[Awaitable[None]]) -> None:
    """Run all; the first error ends the others and is raised by itself."""
    if len(works) == 1:
        return await works[0]
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _while_connected(work: Awaitable[None], connection: ClientConnection) -> None:
    """Run to the end, or until the client is gone. Raises ConnectionResetError."""
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
        if not gone or (task is not None and task.uncancel()):  # somebody else has ended it
            raise
        raise ConnectionResetError from None
    finally:
        connection.unwatch(lost)
