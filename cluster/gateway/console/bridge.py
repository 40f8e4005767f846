"""The admin API as JSON over HTTP, for the console: `POST /console/api/<Service>.<Method>`.

Requests and answers are the messages of cluster.admin.v1 in protobuf's JSON form, with the field names of the proto
files; 64-bit integers are strings. The service objects and the rules are those of the admin port. A stream is sent as
one JSON object per line.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import orjson
from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from cluster.api.outcomes import invalid, shortened
from cluster.gateway.apis.admin.authorization import AdminAuthorizer, AdminMethod, check_texts
from cluster.gateway.apis.http.body import Refused, RequestBodies
from cluster.gateway.apis.http.exchange import Exchange, while_connected
from cluster.gateway.apis.http.protocol import CONNECTION
from cluster.gateway.console.access.access import Viewer
from cluster.gateway.console.errors import JSON_HEADERS, NO_STORE

API: Final = "/console/api/"
SMALL_BYTES: Final = 8192
"""Size up to which messages are converted on the event loop, which takes less than a millisecond."""
MAX_ERROR_CHARS: Final = 300
_FIELDS: Final = re.compile(r"Failed to parse (\w+) field|no field named \"(\w{1,64})\"")

Answer = Callable[[Exchange, Viewer], Awaitable[None]]


class AdminBridge:
    """Handler of the console's admin requests."""

    def __init__(self, methods: Mapping[str, AdminMethod], authorizer: AdminAuthorizer, bodies: RequestBodies) -> None:
        self._methods = methods
        self._authorizer = authorizer
        self._bodies = bodies

    def answers(self) -> Mapping[str, Answer]:
        """Return the functions that answer the admin methods, keyed by path."""
        return {f"{API}{name}": self._answer_of(method) for name, method in self._methods.items()}

    def _answer_of(self, method: AdminMethod) -> Answer:
        act = self._stream if method.is_stream else self._respond

        async def answer(exchange: Exchange, viewer: Viewer) -> None:
            request = await self._request(method, exchange, viewer)
            caller = self._authorizer.authorize(viewer.principal, method, request, exchange.credentials(False).peer)
            await while_connected(act(method.act(request, caller), exchange), exchange.scope[CONNECTION])

        return answer

    async def _request(self, method: AdminMethod, exchange: Exchange, viewer: Viewer) -> Message:
        if not exchange.headers.get(b"content-type", b"").startswith(b"application/json"):
            raise Refused(415, "unsupported_media_type", "content-type must be application/json")
        kind = GetMessageClass(method.descriptor.input_type)
        length = exchange.headers.get(b"content-length", b"")
        connection, tenant = exchange.scope[CONNECTION], viewer.principal.tenant.name
        async with self._bodies.read(exchange.receive, connection, length, tenant) as content:
            if len(content) <= SMALL_BYTES:
                return parse(kind, bytes(content))
            return await self._authorizer.in_thread(parse, kind, bytes(content))

    async def _respond(self, answer: Awaitable[Message], exchange: Exchange) -> None:
        await exchange.respond(200, await self._encoded(await answer), JSON_HEADERS)

    async def _stream(self, answers: Any, exchange: Exchange) -> None:
        kind = (b"content-type", b"application/x-ndjson")
        async for message in answers:
            line = await self._encoded(message) + b"\n"
            if not exchange.started:
                await exchange.start(200, [kind, NO_STORE])
            await exchange.send({"type": "http.response.body", "body": line, "more_body": True})
        if not exchange.started:
            await exchange.start(200, [kind, NO_STORE])
        await exchange.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _encoded(self, message: Message) -> bytes:
        if message.ByteSize() <= SMALL_BYTES:
            return encode(message)
        return await self._authorizer.in_thread(encode, message)


def parse(kind: type[Message], content: bytes) -> Message:
    """Return the message of a JSON text. Raises CallError, which names the field."""
    request = kind()
    if not content.lstrip().startswith(b"{"):  # the parser takes an empty array for an empty message
        raise invalid("", "the body is no JSON object")
    try:
        json_format.Parse(content, request)
    except (json_format.ParseError, ValueError, TypeError, RecursionError, OverflowError) as error:
        first = shortened(str(error).partition("\n")[0], MAX_ERROR_CHARS)
        path = ".".join(parsed or unknown for parsed, unknown in _FIELDS.findall(str(error)[:1000]))
        raise invalid(path, f"the body is no {kind.DESCRIPTOR.name} in JSON: {first}") from None
    check_texts(request)
    return request


def encode(message: Message) -> bytes:
    """Return a message as JSON, with all its fields."""
    plain = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return orjson.dumps(plain)
