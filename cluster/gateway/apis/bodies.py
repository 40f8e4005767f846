"""Where request bodies are read: small ones at once, large or dense ones in a helper process.

Reading 16 MB, or a megabyte of tiny values, holds the interpreter for milliseconds to seconds, in a thread just as
on the event loop. What is small is told by size and by counts of a few characters, which cost microseconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pickle import PickleBuffer
from typing import Any, Final

import structlog

from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.gateway.apis.grpc import requests
from cluster.gateway.apis.grpc.message_scan import scan
from cluster.gateway.apis.json_values import MAX_IDS, NotText
from cluster.gateway.apis.openai.fields import read_object
from cluster.gateway.apis.openai.requests import ParsedRequest, chat_asked, completion_asked
from cluster.gateway.helpers.pool import HelperPool, Lost, TooMuchCpu
from cluster.v1 import inference_pb2 as pb

log = structlog.get_logger("bodies")

SMALL_JSON_BYTES, LARGE_BYTES = 32_768, 1 << 20
SMALL_MESSAGE_BYTES: Final = 8192
FEW_CONTAINERS, FEW_VALUES = 2048, 16_384
"""Objects and arrays, and values, of a JSON body that is read at once: a millisecond or two."""
PATIENCE_S: Final = 5.0
"""As of pool.py: where a helper gets no core, reading in a thread would hold up everybody."""
FEW_ELEMENTS: Final = 2048
"""Of a protobuf message, likewise."""
_ASKED: Final = {"chat": chat_asked, "completion": completion_asked}


class Bodies:
    """Reads the bodies of all APIs. Used from one event loop."""

    def __init__(self) -> None:
        self.pool = HelperPool(lambda: ("bodies", b""), patience_s=PATIENCE_S)

    def close(self) -> None:
        """End the helpers."""
        self.pool.close()

    async def http(
        self, name: str, body: bytes | bytearray, tenant: str = "", most_ids: Callable[[], int] = lambda: MAX_IDS
    ) -> ParsedRequest:
        """A body of the HTTP API: `chat` or `completion`. `most_ids` is asked for large bodies: a prompt with more
        token ids is refused before they are read. Raises CallError."""
        if _is_small_json(body):
            with suppress(NotText):  # a helper finds out in which field
                return _ASKED[name](read_object(bytes(body)))
        asked: ParsedRequest = await self._elsewhere("http", body, tenant, name, most_ids())
        return asked

    async def message(
        self, name: str, data: bytes | bytearray, tenant: str = "", most_ids: Callable[[], int] = lambda: MAX_IDS
    ) -> Any:
        """A request of the gRPC API, as grpc_requests.READ makes it. `most_ids` as for `http`. Raises CallError."""
        call = requests.READ[name]
        if call.only_field and len(data) > requests.MAX_SMALL_BYTES:
            most = requests.MAX_SMALL_BYTES
            raise invalid(call.only_field, f"the request has {len(data)} bytes; at most {most} are taken: shorten it")
        if _is_small_message(call.kind, data):
            return call.read(requests.decoded(call.kind, data))
        return await self._elsewhere("message", data, tenant, name, most_ids())

    async def session(self, data: bytes | bytearray, tenant: str = "") -> list[Any] | pb.SessionRequest:
        """A message of a session: itself where it is small, else its items. Raises CallError."""
        if _is_small_message(pb.SessionRequest, data):
            request: pb.SessionRequest = requests.decoded(pb.SessionRequest, data)
            return request
        items: list[Any] = await self._elsewhere("session", data, tenant)
        return items

    async def _elsewhere(self, method: str, data: bytes | bytearray, tenant: str, *more: Any) -> Any:
        try:
            result = await self.pool.run((method, (PickleBuffer(data), *more), {}), size=len(data), tenant=tenant)
        except TooMuchCpu:
            raise _unreadable() from None
        except Lost as lost:
            log.warning("body_not_read", method=method, reason=str(lost))
            raise _unreadable() from None
        if result is not None:
            return result
        return await asyncio.to_thread(_read_here, method, data, *more)


def _read_here(method: str, data: bytes | bytearray, *more: Any) -> Any:
    """What a helper would read. It imports what large bodies need, which a gateway's start does without."""
    from cluster.gateway.apis.body_parser import BodyReader

    return getattr(BodyReader(), method)(data, *more)


def _unreadable() -> CallError:
    return CallError(Outcome.INTERNAL, "the request could not be read; send less, or a simpler one")


def _is_small_json(body: bytes | bytearray) -> bool:
    size = len(body)
    if size <= SMALL_JSON_BYTES:
        return True
    return (
        size <= LARGE_BYTES and body.count(b"[") + body.count(b"{") <= FEW_CONTAINERS and body.count(b",") <= FEW_VALUES
    )


def _is_small_message(kind: Any, data: bytes | bytearray) -> bool:
    size = len(data)
    if size <= SMALL_MESSAGE_BYTES:
        return True
    return size <= LARGE_BYTES and scan(kind.DESCRIPTOR, data, FEW_ELEMENTS).elements <= FEW_ELEMENTS
