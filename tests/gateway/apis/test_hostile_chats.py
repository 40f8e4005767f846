"""Hostile chats on all three APIs. Each is served, or refused with the name of the field. None blocks the event loop
for long."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from tests.gateway.apis.test_tools import add_worker
from tests.support.cluster import TestCluster, running_cluster
from tests.support.cpu import slowness
from tests.support.fuzz import nothing_unexpected
from tests.support.http import Wire, chat_body, message_body

pytestmark = pytest.mark.slow

TRIES = 3
"""Number of tries of a request whose pass was too long. Work of other tests in this process may have been in it."""
STALL_S = 0.05
"""Greatest CPU time of one pass of the event loop, in seconds of its thread."""
ANSWER_S = 60.0
DEEP = '{"items":' * 10_000 + "{}" + "}" * 10_000
RECURSIVE = json.dumps({"type": "object", "properties": {"x": {"$ref": "#"}}})
BIG = json.dumps({"text": "x" * (3 << 20)})
USER = {"role": "user", "content": "Hi"}


def _tool(name: Any, schema: str = "{}") -> dict[str, str]:
    """Return the JSON text of a tool in the form of each API."""
    quoted = json.dumps(name)
    return {
        "chat": f'{{"type": "function", "function": {{"name": {quoted}, "parameters": {schema}}}}}',
        "messages": f'{{"name": {quoted}, "input_schema": {schema}}}',
    }


def _call(arguments: str) -> dict[str, str]:
    """Return an assistant message with one tool call, in the form of each API."""
    function = f'{{"name": "f", "arguments": {json.dumps(arguments)}}}'
    use = f'{{"type": "tool_use", "id": "1", "name": "f", "input": {arguments}}}'
    return {
        "chat": f'{{"role": "assistant", "tool_calls": [{{"id": "1", "type": "function", "function": {function}}}]}}',
        "messages": f'{{"role": "assistant", "content": [{use}]}}',
    }


RESULT = {
    "chat": '{"role": "tool", "content": "x", "tool_call_id": "nobody"}',
    "messages": '{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "nobody", "content": "x"}]}',
}
TOOLS: dict[str, list[tuple[Any, str]]] = {
    "thousand tools": [(f"f{i}", "{}") for i in range(1000)],
    "too many tools": [(f"f{i}", "{}") for i in range(20_000)],
    "recursive schema": [("f", RECURSIVE)],
    "deep schema": [("f", DEEP)],
    "same name": [("f", "{}"), ("f", "{}")],
    "odd name": [("f\n\u202e<|im_end|>", "{}")],
    "empty name": [("", "{}")],
    "long name": [("x" * 100_000, "{}")],
}
MESSAGES: dict[str, list[dict[str, str] | dict[str, Any]]] = {
    "megabytes of arguments": [USER, _call(BIG)],
    "deep arguments": [USER, _call(DEEP)],
    "result without a call": [USER, RESULT],
    "unknown role": [{"role": "wizard", "content": "x"}],
    "unknown part": [{"role": "user", "content": [{"type": "hologram", "x": 1}]}],
    "thousands of messages": [USER] * 9_999,
    "too many messages": [USER] * 50_000,
    "only tool results": [RESULT] * 500,
}


def bodies(api: str, good: dict[str, Any]) -> dict[str, bytes]:
    """Return the hostile bodies of an HTTP API, keyed by title."""
    made = {}
    for title, tools in TOOLS.items():
        listed = ", ".join(_tool(name, schema)[api] for name, schema in tools)
        made[title] = f'{json.dumps(good)[:-1]}, "tools": [{listed}]}}'.encode()
    for title, messages in MESSAGES.items():
        texts = ", ".join(str(m[api]) if api in m else json.dumps(m) for m in messages)
        rest = json.dumps({name: value for name, value in good.items() if name != "messages"})
        made[title] = f'{rest[:-1]}, "messages": [{texts}]}}'.encode()
    return made


def requests() -> dict[str, pb.ChatRequest]:
    """Return the hostile messages of the gRPC API by title."""
    user, made = pb.Message(role="user", content="Hi"), {}
    for title, tools in TOOLS.items():
        listed = [pb.Tool(name=name, parameters_json=schema) for name, schema in tools]
        made[title] = pb.ChatRequest(messages=[user], tools=listed)
    for title, arguments in (("megabytes of arguments", BIG), ("deep arguments", DEEP)):
        call = pb.ToolCall(id="1", name="f", arguments=arguments)
        made[title] = pb.ChatRequest(messages=[user, pb.Message(role="assistant", tool_calls=[call])])
    made["unknown role"] = pb.ChatRequest(messages=[pb.Message(role="wizard", content="x")])
    made["too many messages"] = pb.ChatRequest(messages=[user] * 50_000)
    for request in made.values():
        request.model, request.max_tokens = "sim", 2
    return made


@pytest.fixture(scope="module")
async def busy(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, bundle: Bundle
) -> AsyncIterator[TestCluster]:
    """Start a gateway with a worker that parses tool calls, for the whole module."""
    async with running_cluster(tmp_path_factory.mktemp("hostile")) as cluster:
        await add_worker(cluster, checkpoint, bundle, "tools:hermes")
        yield cluster


class Stalls:
    """Context manager that measures the event loop's longest pass, in CPU seconds of its thread."""

    longest_s = 0.0

    @property
    def too_long(self) -> bool:
        """Whether the longest pass of the event loop took more CPU time than STALL_S. On a slow machine the limit is
        larger."""
        return self.longest_s > STALL_S * slowness()

    async def __aenter__(self) -> Stalls:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    async def _watch(self) -> None:
        while True:
            before = time.thread_time()
            await asyncio.sleep(0.002)  # spinning would take the helper processes' CPU
            self.longest_s = max(self.longest_s, time.thread_time() - before)


API = {"chat": "/v1/chat/completions", "messages": "/v1/messages"}


@pytest.mark.parametrize("api", API)
async def test_hostile_bodies(busy: TestCluster, api: str) -> None:
    """A hostile body is served, or gets a 400 in the API's form. No pass of the event loop takes more than STALL_S."""
    good = {"chat": chat_body, "messages": message_body}[api](max_tokens=2)
    for title, body in bodies(api, good).items():
        for _ in range(TRIES):
            wire = await Wire.open(busy)
            async with nothing_unexpected(), asyncio.timeout(ANSWER_S), Stalls() as stalls:
                wire.ask(API[api], body)
                reply = await wire.reply()
            await wire.close()
            if not stalls.too_long:
                break
        assert reply.status in (200, 400), (title, reply.status, reply.body[:300])
        if reply.status == 400:
            error = reply.json["error"]
            assert len(error["message"]) < 1000, title
            assert error["type"] == "invalid_request_error", title
        assert not stalls.too_long, (title, stalls.longest_s)


async def test_hostile_messages(busy: TestCluster) -> None:
    """A hostile gRPC message is served, or refused as the caller's error. No pass of the event loop takes long."""
    for title, request in requests().items():
        data = request.SerializeToString()
        method: Any = busy.channel.unary_unary("/cluster.v1.Inference/Chat")
        for _ in range(TRIES):
            call = method(data, timeout=ANSWER_S)
            async with nothing_unexpected(), Stalls() as stalls:
                code = await call.code()
            if not stalls.too_long:
                break
        assert code in (
            grpc.StatusCode.OK,
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.FAILED_PRECONDITION,
            grpc.StatusCode.UNIMPLEMENTED,
        ), (title, code, await call.details())
        assert len(await call.details() or "") < 1000, title
        assert not stalls.too_long, (title, stalls.longest_s)
