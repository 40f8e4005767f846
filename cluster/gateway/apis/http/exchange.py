"""An HTTP request with its response, and the steps that all HTTP APIs share: authenticate, read a call's body, map
errors to responses, and end a call whose client is gone. An `ApiForm` holds the differences between the APIs.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from functools import lru_cache
from itertools import chain
from typing import Any, Protocol

import structlog

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.apis.http.body import Refused
from cluster.gateway.apis.http.protocol import CONNECTION
from cluster.gateway.apis.request_ids import random_id, request_id, traceparent
from cluster.gateway.apis.slices import in_slices
from cluster.gateway.auth.authenticator import DEFAULT_PRINCIPAL, Authenticator, Credentials, alternative_names
from cluster.gateway.calls.meta import do_nothing
from cluster.gateway.calls.stream_writer import Transport
from cluster.gateway.calls.unread_answers import UnreadAnswer, UnreadAnswers
from cluster.observe.log import CallFields, ids_of_call
from cluster.policy.tenants.identity import Principal

log = structlog.get_logger("http")

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

Application = Callable[[Scope, Receive, Send], Awaitable[None]]

PIECE_BYTES = 1 << 18
"""Size in bytes of the pieces in which a large response is sent."""
_EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ClientConnection(Transport, Protocol):
    """The connection on which a request came. The server puts the connection into the ASGI scope of the request."""

    transport: Any

    def watch(self, lost: Callable[[], None]) -> None:
        """Call `lost` when the client is gone. If the client is gone already, `lost` is called soon."""

    def unwatch(self, lost: Callable[[], None]) -> None:
        """Stop calling `lost`."""

    def mark_authenticated(self) -> None:
        """Record that the client presented a valid credential."""

    def charge_refusal(self) -> None:
        """Count a refused request."""


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """The response to a request that failed. `content`: JSON."""

    status: int
    content: bytes
    headers: Sequence[tuple[bytes, bytes]] = ()


class ApiForm(Protocol):
    """The form of an API's errors, request ids and credentials."""

    @property
    def request_id_headers(self) -> Sequence[bytes]:
        """Names of the response headers that hold the request id."""

    @property
    def key_header(self) -> bytes:
        """Name of a request header that may hold an API key instead of `authorization`; b"" if there is none."""

    def refused(self, refused: Refused, request_id: str) -> ErrorAnswer:
        """Return the response to a request that did not become a call."""

    def failed(self, error: CallError, request_id: str) -> ErrorAnswer:
        """Return the response to a call that failed."""

    def event(self, error: CallError, request_id: str) -> bytes:
        """Return an error as the last event of a stream that has begun."""


class Exchange:
    """An HTTP request and the response to the request."""

    def __init__(self, form: ApiForm, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.receive = receive
        self.send = send
        self.started = False
        self.principal = DEFAULT_PRINCIPAL
        self.limit_headers: list[tuple[bytes, bytes]] = []
        """Headers that hold the caller's rate limits, for a successful answer."""
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.request_id = request_id(self.header(b"x-request-id")) or random_id()
        self.release_body = do_nothing
        """Returns the bytes of the request's body to the budget of request bytes."""
        self._form = form
        self._authenticate: Authenticate | None = None

    @property
    def log_fields(self) -> Mapping[str, str]:
        """Fields of log lines about the request."""
        return ids_of_call(self.request_id, traceparent(self.header(b"traceparent"))[3:35])

    def header(self, name: bytes) -> str:
        """Return the value of a header; "" if the header is absent."""
        return self.headers.get(name, b"").decode("latin-1")

    def credentials(self, certificates: bool) -> Credentials:
        """Return the credentials that the caller presents. `certificates`: whether client certificates are accepted; if
        so, the credentials include the names in the caller's certificate."""
        host, port = self.scope.get("client") or ("", 0)
        tls = self.scope[CONNECTION].transport.get_extra_info("ssl_object") if certificates else None
        names = alternative_names(tls.getpeercert()) if tls is not None else ()
        return Credentials(self._authorization(), names, f"{host}:{port}")

    def authenticate_by(self, authenticate: Authenticate | None) -> None:
        """Set the function that authenticates the request; None: every caller has the default principal."""
        self._authenticate = authenticate

    async def authenticate(self) -> Principal:
        """Authenticate the caller, and return the principal. Raises CallError and Refused."""
        if self._authenticate is not None:
            self.principal = await self._authenticate(self)
        return self.principal

    def _authorization(self) -> tuple[str, ...]:
        """Return the values of the header `authorization`. If the API has its own key header and that header holds
        another key, the key is added as a further value. A request with several values is refused later."""
        headers, key_header = self.scope["headers"], self._form.key_header
        values = [value.decode("latin-1") for name, value in headers if name == b"authorization"]
        if not key_header:
            return tuple(values)
        keys = [value.decode("latin-1") for name, value in headers if name == key_header and value]
        return (*values, *(value for value in map("Bearer {}".format, keys) if value not in values))

    async def start(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Send the status and the headers of the response."""
        self.started = True
        shown_id = self.request_id.encode()
        common = [(b"date", _date(int(time.time())))]
        common += [(name, shown_id) for name in self._form.request_id_headers]
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

    async def respond_once_read(self, content: bytes, unread_answers: UnreadAnswers) -> None:
        """Send a complete JSON response. A long one is sent as the client reads, and counts until it was read."""
        if len(content) <= PIECE_BYTES:
            await self.respond(200, content, self.limit_headers)
            return
        with unread_answers.answer(self.principal.tenant.name) as unread:
            await unread.hold(len(content))
            await self.respond_in_parts(200, [content], self.limit_headers, unread)

    async def respond_in_parts(
        self,
        status: int,
        parts: list[bytes | bytearray] | Iterator[bytes],
        headers: Sequence[tuple[bytes, bytes]] = (),
        unread: UnreadAnswer | None = None,
    ) -> None:
        """Send a complete JSON response that is made of parts. The later parts of a long response are sent as the
        client reads. The parts of an iterator are made only then, and the length of a long response is not told to the
        client. `unread`: counts the bytes of a list, which is emptied."""
        if not isinstance(parts, list) and self.scope["http_version"] == "1.0":  # which has no chunks
            parts = list[bytes | bytearray](await in_slices(parts))
        size = sum(map(len, parts)) if isinstance(parts, list) else None
        pieces = _pieces(_emptied(parts) if isinstance(parts, list) else parts)
        first, second = next(pieces, b""), next(pieces, b"")
        if not second:
            await self.respond(status, first, headers)
            return
        length = [] if size is None else [(b"content-length", b"%d" % size)]
        await self.start(status, [(b"content-type", b"application/json"), *length, *headers])
        sent = 0
        for piece in chain((first, second), pieces):
            await self.send({"type": "http.response.body", "body": piece, "more_body": True})
            sent += len(piece)
            if unread is not None and size is not None:
                unread.shrink(size - sent)
            await asyncio.sleep(0)
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def refuse(self, refused: Refused) -> None:
        """Send the response to a request that did not become a call."""
        answer = self._form.refused(refused, self.request_id)
        await self.respond(answer.status, answer.content, answer.headers)

    async def fail(self, error: CallError) -> None:
        """Send the error of a call: as the response, or as an event if the stream has begun."""
        if self.started:
            await self.write(self._form.event(error, self.request_id), more=False)
            return
        answer = self._form.failed(error, self.request_id)
        headers = [*answer.headers, *([(b"www-authenticate", b"Bearer")] if answer.status == 401 else [])]
        await self.respond(answer.status, answer.content, headers)


@lru_cache(maxsize=1)
def _date(second: int) -> bytes:
    """Return the value of the header `date` for a second since the Unix epoch."""
    return formatdate(second, usegmt=True).encode()


def _emptied(parts: list[bytes | bytearray]) -> Iterator[bytes | bytearray]:
    """Yield the parts of a list, and remove them from the list."""
    parts.reverse()
    while parts:
        yield parts.pop()


def _pieces(parts: Iterator[bytes | bytearray] | Iterator[bytes]) -> Iterator[bytes]:
    """Yield the bytes of all parts in pieces of about PIECE_BYTES."""
    some: list[memoryview] = []
    size = 0
    for part in parts:
        view = memoryview(part)
        for at in range(0, len(view), PIECE_BYTES):
            some.append(piece := view[at : at + PIECE_BYTES])
            size += len(piece)
            if size >= PIECE_BYTES:
                yield b"".join(some)
                some, size = [], 0
    if some:
        yield b"".join(some)


Authenticate = Callable[[Exchange], Awaitable[Principal]]
"""Function that returns the principal of a request, or raises CallError or Refused."""


def by_credentials(authenticator: Authenticator) -> Authenticate:
    """Return the function that authenticates requests by their API key, JWT or client certificate."""

    async def authenticate(exchange: Exchange) -> Principal:
        return await authenticator.principal(exchange.credentials(authenticator.by_certificate))

    return authenticate


class Endpoint:
    """The ASGI application of one route. It checks the HTTP method and maps errors to responses. With `authenticate`,
    it also authenticates the caller before the body is read."""

    def __init__(
        self,
        form: ApiForm,
        method: str,
        answer: Callable[[Exchange], Awaitable[None]],
        authenticate: Authenticate | None = None,
    ) -> None:
        self._form = form
        self._authenticate = authenticate
        self._methods = ("GET", "HEAD") if method == "GET" else (method,)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(self._form, scope, receive, send)
        exchange.authenticate_by(self._authenticate)
        try:
            if scope["method"] not in self._methods:
                allow = [(b"allow", ", ".join(self._methods).encode())]
                raise Refused(405, "method_not_allowed", f"use {self._methods[0]} on {scope['path']}", allow)
            if self._authenticate is not None:
                await exchange.authenticate()
                scope[CONNECTION].mark_authenticated()
            with CallFields(exchange.log_fields):
                await self._answer(exchange)
        except ConnectionResetError:
            return
        except Refused as refused:
            scope[CONNECTION].charge_refusal()
            await exchange.refuse(refused)
        except CallError as error:
            scope[CONNECTION].charge_refusal()
            await exchange.fail(error)
        except Exception:  # callers get no traceback; the log has it under the request id
            log.exception("request.failed", **exchange.log_fields)
            message = f"unexpected failure; quote request id {exchange.request_id}"
            await exchange.fail(CallError(Outcome.INTERNAL, message))
        finally:
            exchange.release_body()


def as_headers(pairs: Sequence[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    """Return headers as pairs of bytes."""
    return [(name.encode("ascii"), value.encode("ascii")) for name, value in pairs]


def retry_headers(error: CallError) -> list[tuple[bytes, bytes]]:
    """Return the headers of an error: the rate limits, the retry delay in whole seconds, and the retry delay in
    milliseconds, which some clients read."""
    headers = as_headers(error.headers)
    if error.retry_after_s is None:
        return headers
    return [
        *headers,
        (b"retry-after", b"%d" % math.ceil(error.retry_after_s)),
        (b"retry-after-ms", b"%d" % (error.retry_after_s * 1000)),
    ]


async def while_connected(work: Awaitable[None], connection: ClientConnection) -> None:
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
