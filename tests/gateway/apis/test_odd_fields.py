"""A request with an odd value in any field never ends in an unexpected failure: the status is not INTERNAL or UNKNOWN
over gRPC, and is below 500 over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.gateway.apis.anthropic.requests import COUNT_FIELDS, MESSAGES_FIELDS
from cluster.gateway.apis.openai.requests import CHAT_FIELDS, COMPLETION_FIELDS
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from tests.support.cluster import TestCluster, running_cluster, sim_engine
from tests.support.fuzz import nothing_unexpected
from tests.support.http import Wire, chat_body, completion_body, message_body

pytestmark = pytest.mark.slow

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"]
CALL_S = 10.0
DEEP = '{"a":' * 500 + "1" + "}" * 500
TEXTS = [
    "",
    "[" * 3000,
    DEEP,
    '{"a": "\\ud800"}',
    b'{"after": 5}'.hex(),
    "\0",
    "x" * 5000,
    "{}",
    "1e999",
    "sim",
]
NUMBERS = [-1, 0, 2**31 - 1, -(2**31)]
JSON = [
    *("null", "[]", "{}", "-1", "1e400", "NaN", '""', '"\\ud800"', "9" * 400, "[[" * 200, DEEP),
    *('[{"a":1}]', '{"a":{"b":[1]}}', "[null]", "[-1,true]"),
]


@pytest.fixture(scope="module")
async def busy(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, bundle: Bundle
) -> AsyncIterator[TestCluster]:
    """Start a gateway with a worker, for the whole module."""
    async with running_cluster(tmp_path_factory.mktemp("odd")) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=0.2), bundle)
        yield cluster


def _odd(kind: Any, depth: int = 3) -> Iterator[Any]:
    """Yield messages of the type `kind`. Each has one odd value; the model and a few other fields have usual values."""
    for field in kind.DESCRIPTOR.fields:
        for value in _values(field, depth):
            message = kind()
            for name, usual in (("model", "sim"), ("prompt", "a"), ("max_tokens", 2), ("role", "user")):
                if name in kind.DESCRIPTOR.fields_by_name and name != field.name:
                    setattr(message, name, usual)
            with contextlib.suppress(ValueError, TypeError):
                if field.is_repeated and field.message_type is None:
                    getattr(message, field.name).append(value)
                elif field.is_repeated:
                    getattr(message, field.name).add().CopyFrom(value)
                elif field.message_type is not None:
                    getattr(message, field.name).CopyFrom(value)
                else:
                    setattr(message, field.name, value)
                yield message


def _values(field: Any, depth: int) -> list[Any]:
    if field.message_type is not None:
        if field.message_type.GetOptions().map_entry or not depth or field.message_type.name == "SessionRequest":
            return []
        return list(_odd(getattr(pb, field.message_type.name), depth - 1))
    if field.cpp_type == field.CPPTYPE_STRING:
        return [text.encode() for text in TEXTS] if field.type == field.TYPE_BYTES else TEXTS
    return NUMBERS if field.cpp_type not in (field.CPPTYPE_BOOL, field.CPPTYPE_ENUM) else [True]


CLIENT_FAULT, TRIES = "Internal error from Core", 3
"""Details that the client library itself makes up now and then, if a refusal arrives while the client still writes, and
the number of tries of one message."""


@pytest.mark.parametrize("method", [m.name for m in SERVICE.methods if m.name != "Session"])
async def test_every_field_of_every_message(busy: TestCluster, method: str) -> None:
    """A message with JSON in a text, deep nesting or an extreme number gets a status that is not INTERNAL or
    UNKNOWN."""
    kind = getattr(pb, SERVICE.methods_by_name[method].input_type.name)
    limit = asyncio.Semaphore(16)

    async def status(message: Any) -> tuple[str, str]:
        stream: Any = busy.channel.stream_stream(f"/{SERVICE.full_name}/{method}")(timeout=CALL_S)
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await stream.write(message.SerializeToString())
            await stream.done_writing()
            async for _ in stream:
                pass
        return (await stream.code()).name, await stream.details()

    async def send(message: Any) -> None:
        async with limit:
            for _ in range(TRIES):
                code, details = await status(message)
                if details != CLIENT_FAULT:
                    break
            assert code not in ("INTERNAL", "UNKNOWN"), (str(message)[:500], details)

    async with nothing_unexpected():
        await asyncio.gather(*map(send, _odd(kind)))


@pytest.mark.parametrize(
    ("path", "good", "fields"),
    [("/v1/chat/completions", chat_body(max_tokens=2), CHAT_FIELDS),
     ("/v1/completions", completion_body(max_tokens=2), COMPLETION_FIELDS),
     ("/v1/messages", message_body(max_tokens=2), MESSAGES_FIELDS),
     ("/v1/messages/count_tokens", message_body(), COUNT_FIELDS)],
    ids=["chat", "completion", "messages", "count_tokens"],
)  # fmt: skip
async def test_every_field_of_every_body(
    busy: TestCluster, path: str, good: dict[str, Any], fields: frozenset[str]
) -> None:
    """A JSON body with an odd value in any field gets a status below 500."""
    wire = await Wire.open(busy)
    async with nothing_unexpected():
        for name in sorted(fields):
            rest = json.dumps({key: value for key, value in good.items() if key != name})[1:]
            for value in JSON:
                wire.ask(path, f'{{"{name}": {value}, {rest}'.encode())
                async with asyncio.timeout(60):
                    reply = await wire.reply()
                assert reply.status < 500, (name, value[:40], reply.body)
    await wire.close()
