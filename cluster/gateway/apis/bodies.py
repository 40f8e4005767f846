"""Parsing of request bodies. Small bodies are parsed on the event loop, large bodies and bodies of very many values in
a helper process.

Parsing 16 MB, or a megabyte of tiny values, holds the interpreter lock for milliseconds to seconds, even in a thread.
The size of a body and the number of brackets and commas in it decide whether it counts as small. Counting these
characters takes microseconds.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pickle import PickleBuffer
from typing import Any, Final

import structlog

from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.gateway.apis.anthropic.requests import PARSERS as ANTHROPIC_PARSERS
from cluster.gateway.apis.grpc import requests
from cluster.gateway.apis.json_values import MAX_IDS, NotText
from cluster.gateway.apis.openai.fields import Fields, read_object
from cluster.gateway.apis.openai.pooling_requests import PARSERS as POOLING_PARSERS
from cluster.gateway.apis.openai.requests import ParsedRequest, parse_chat, parse_completion
from cluster.gateway.calls.pooling.pooling_request import ParsedPooling
from cluster.gateway.helpers.pool import HelperPool, JobLost, TooMuchCpu
from cluster.observe.log import call_fields
from cluster.v1 import inference_pb2 as pb
from cluster.wire.message_scan import scan, started_call

log = structlog.get_logger("bodies")

SMALL_JSON_BYTES, LARGE_BYTES = 32_768, 1 << 20
SMALL_MESSAGE_BYTES: Final = 8192
FEW_CONTAINERS, FEW_VALUES = 2048, 16_384
"""Upper bounds on the containers (objects and arrays) and on the values in a JSON body that is parsed on the event
loop. Parsing such a body takes one or two milliseconds."""
PATIENCE_S: Final = 5.0
"""Seconds that a helper process may wait for a core (helpers/pool.py). After that, the body is parsed in a thread of
this process, which delays all calls."""
FEW_ELEMENTS: Final = 2048
"""Upper bound on the fields and list elements in a protobuf message that is parsed on the event loop."""
_PARSERS: Final[Mapping[str, Callable[[Fields], ParsedRequest | ParsedPooling]]] = {
    "chat": parse_chat,
    "completion": parse_completion,
    **ANTHROPIC_PARSERS,
    **POOLING_PARSERS,
}


class Bodies:
    """Parses the request bodies of all APIs. Used from one event loop."""

    def __init__(self) -> None:
        self.pool = HelperPool(lambda: ("bodies", b""), patience_s=PATIENCE_S)
        self._one_at_a_time = asyncio.Lock()

    def close(self) -> None:
        """Stop the helper processes."""
        self.pool.close()

    async def http(
        self, name: str, body: bytes | bytearray, tenant: str = "", max_ids: Callable[[], int] = lambda: MAX_IDS
    ) -> Any:
        """Parse a request body of the HTTP API. Returns a ParsedRequest, or for a pooling request a ParsedPooling.
        Raises CallError.

        `name`: the name of a parser in _PARSERS. `max_ids`: returns the largest allowed number of token ids in a
        prompt; a prompt with more ids is refused before it is parsed. `max_ids` is called for large bodies only.
        """
        if len(body) <= SMALL_JSON_BYTES:
            with suppress(NotText):  # the helper process finds the field and reports it
                return _PARSERS[name](read_object(bytes(body)))
        elif _is_small_json(body):
            async with self._one_at_a_time:  # else bodies that arrive together would block the event loop together
                await asyncio.sleep(0)
                with suppress(NotText):
                    return _PARSERS[name](read_object(bytes(body), None))  # few values, so few strings
        return await self._read_in_helper("http", body, tenant, name, max_ids())

    async def message(
        self, name: str, data: bytes | bytearray, tenant: str = "", max_ids: Callable[[], int] = lambda: MAX_IDS
    ) -> Any:
        """Parse a request of the gRPC API with the method's parser in grpc.requests.READ. Raises CallError.

        `name`: the gRPC method. `max_ids`: returns the largest allowed number of token ids in a prompt. It is called
        for large messages only.
        """
        call = requests.READ[name]
        if call.only_field and len(data) > requests.MAX_SMALL_BYTES:
            most = requests.MAX_SMALL_BYTES
            raise invalid(call.only_field, f"the request has {len(data)} bytes; at most {most} are allowed: shorten it")
        if _is_small_message(call.kind, data):
            return call.read(requests.decoded(call.kind, data))
        return await self._read_in_helper("message", data, tenant, name, max_ids())

    async def session(self, data: bytes | bytearray, tenant: str = "") -> list[Any] | pb.SessionRequest:
        """Parse a message of a session. Returns the decoded message if the message is small, else a list of the calls
        that the message starts and cancels. If the message cannot be read but starts a single call, this call gets the
        error. Raises CallError."""
        if _is_small_message(pb.SessionRequest, data):
            request: pb.SessionRequest = requests.decoded(pb.SessionRequest, data)
            return request
        try:
            items: list[Any] = await self._read_in_helper("session", data, tenant)
        except CallError as error:
            if (call_id := started_call(data)) is None:
                raise
            return [requests.SessionStart(call_id, False, error, 0, "", "", "")]
        return items

    async def _read_in_helper(self, method: str, data: bytes | bytearray, tenant: str, *more: Any) -> Any:
        try:
            result = await self.pool.run((method, (PickleBuffer(data), *more), {}), size=len(data), tenant=tenant)
        except TooMuchCpu:
            raise _unreadable() from None
        except JobLost as lost:
            log.warning("request.body_not_read", **call_fields(), method=method, reason=str(lost))
            raise _unreadable() from None
        if result is not None:
            return result
        return await asyncio.to_thread(_read_in_thread, method, data, *more)


def _read_in_thread(method: str, data: bytes | bytearray, *more: Any) -> Any:
    """Parse a body in a thread of this process instead of a helper process. The module of the parser is imported here,
    since a gateway can start without that module."""
    from cluster.gateway.apis.body_parser import BodyReader

    return getattr(BodyReader(), method)(data, *more)


def _unreadable() -> CallError:
    return CallError(Outcome.INTERNAL, "the request could not be parsed; send a smaller or simpler one")


def _is_small_json(body: bytes | bytearray) -> bool:
    """Return whether a body is small enough to be parsed on the event loop: at most LARGE_BYTES, with few values.
    Called only for a body of more than SMALL_JSON_BYTES."""
    return len(body) <= LARGE_BYTES and _has_few_values(body)


def _has_few_values(text: bytes | bytearray) -> bool:
    """Return whether a JSON text has few values, judged by its brackets and commas."""
    if "numpy" not in sys.modules:  # deferred_imports.py imports it soon, without blocking the event loop
        return text.count(b"[") + text.count(b"{") <= FEW_CONTAINERS and text.count(b",") <= FEW_VALUES
    from cluster.gateway.apis.large_json import count_of

    return count_of(b"[{", text) <= FEW_CONTAINERS and count_of(b",", text) <= FEW_VALUES


def _is_small_message(kind: Any, data: bytes | bytearray) -> bool:
    size = len(data)
    if size <= SMALL_MESSAGE_BYTES:
        return True
    if size > LARGE_BYTES or not _has_few_values(data):  # schemas and arguments are JSON in fields of the message
        return False
    return scan(kind.DESCRIPTOR, data, FEW_ELEMENTS).elements <= FEW_ELEMENTS
