"""Answers with thinking and tool calls over Anthropic's API, through a real gateway and a worker that parses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anthropic
import pytest

from cluster.api.output_parts import OutputPart, PartKind
from cluster.gateway.apis.anthropic.content import chat_messages
from cluster.gateway.apis.openai.fields import Fields
from cluster.wire.bundle import Bundle
from tests.gateway.apis.anthropic.test_app import MESSAGES, client
from tests.gateway.apis.anthropic.test_stream import events_of, joined
from tests.support.cluster import running_cluster
from tests.support.http import fetch, message_body
from tests.support.parsed_outputs import ParsedByEngine
from tests.support.parts_engine import PartsEngine

pytestmark = pytest.mark.slow

ARGUMENTS = ['{"city": ', '"Zürich"', ', "days"', ": 3}"]
SCRIPT: list[list[OutputPart]] = [
    [OutputPart(PartKind.REASONING, "Let me ")],
    [OutputPart(PartKind.REASONING, "think.")],
    [],
    [OutputPart(PartKind.CONTENT, "I look ")],
    [OutputPart(PartKind.CONTENT, "it up.")],
    [OutputPart(PartKind.TOOL_NAME, "weather")],
    *([OutputPart(PartKind.TOOL_ARGUMENTS, text)] for text in ARGUMENTS),
    [OutputPart(PartKind.TOOL_NAME, "time", 1), OutputPart(PartKind.TOOL_ARGUMENTS, "{", 1)],
    [OutputPart(PartKind.TOOL_ARGUMENTS, "}", 1)],
    [],
]
TOOLS = [{"name": name, "input_schema": {"type": "object"}} for name in ("weather", "time")]


async def test_thinking_and_tool_calls(tmp_path: Path, bundle: Bundle) -> None:
    """Whole and streamed answers have the same blocks: thinking, text, and a tool_use block for each tool call, each
    with its own id. This also holds with the official client. The answer can be sent back with the results of its tool
    calls."""
    async with running_cluster(tmp_path) as cluster:
        worker = await cluster.add_worker(PartsEngine(SCRIPT, reasoning_tokens=2), bundle, parser=ParsedByEngine())
        body = message_body(max_tokens=50, tools=TOOLS)
        del body["temperature"]
        whole = (await fetch(cluster, MESSAGES, body)).json
        streamed = joined(events_of((await fetch(cluster, MESSAGES, {**body, "stream": True})).body))
        async with client(cluster) as ai:
            made: list[anthropic.types.Message] = [await ai.messages.create(**body)]
            async with ai.messages.stream(**body) as stream:
                made.append(await stream.get_final_message())
            answers: list[dict[str, Any]] = [whole, streamed, *(message.to_dict() for message in made)]
            for answer in answers:
                assert _without_ids(answer["content"]) == [
                    {"type": "thinking", "thinking": "Let me think.", "signature": ""},
                    {"type": "text", "text": "I look it up."},
                    {"type": "tool_use", "name": "weather", "input": json.loads("".join(ARGUMENTS))},
                    {"type": "tool_use", "name": "time", "input": {}},
                ]
                assert answer["stop_reason"] == "tool_use"
                assert answer["usage"]["output_tokens"] == len(SCRIPT)
                assert answer["usage"]["output_tokens_details"] == {"thinking_tokens": 2}
            uses = [block for block in made[1].content if block.type == "tool_use"]
            results: Any = [{"type": "tool_result", "tool_use_id": use.id, "content": "ok"} for use in uses]
            history: Any = [*body["messages"], {"role": "assistant", "content": made[1].content}]
            again = await ai.messages.create(**body | {"messages": [*history, {"role": "user", "content": results}]})
        assert again.stop_reason == "tool_use"
        ids = {block["id"] for answer in answers for block in answer["content"] if block["type"] == "tool_use"}
        assert len(ids) == 8
        assert all(tool_id.startswith("toolu_") for tool_id in ids)
        assert isinstance(worker.engine, PartsEngine)
        parsing = [request.parsing for request in worker.engine.requests if request.parsing is not None]
        assert [asked.is_whole for asked in parsing] == [True, False, True, False, True]


async def test_kimis_tool_calls_are_numbered(tmp_path: Path, bundle: Bundle) -> None:
    """With a parser of Kimi's models, tool calls are numbered through the whole conversation, and the number is the end
    of the call's id. The gateway puts the prefix `toolu_` before the id. When the client sends the answer back, the
    prefix is removed from the prompt."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.add_worker(PartsEngine(SCRIPT, tool_parser="kimi_k2"), bundle, parser=ParsedByEngine())
        body = message_body(max_tokens=50, tools=TOOLS)
        for first in (0, 2):
            expected = [f"toolu_functions.weather:{first}", f"toolu_functions.time:{first + 1}"]
            whole = (await fetch(cluster, MESSAGES, body)).json
            streamed = joined(events_of((await fetch(cluster, MESSAGES, {**body, "stream": True})).body))
            for answer in (whole, streamed):
                assert [block["id"] for block in answer["content"] if block["type"] == "tool_use"] == expected
            results = [{"type": "tool_result", "tool_use_id": tool_id, "content": "ok"} for tool_id in expected]
            turns = [{"role": "assistant", "content": whole["content"]}, {"role": "user", "content": results}]
            body["messages"] = [*body["messages"], *turns]
        messages = chat_messages(Fields(body))
        called = [call["id"] for message in messages for call in message.get("tool_calls", ())]
        assert called == [f"functions.{name}:{i}" for i, name in enumerate(["weather", "time"] * 2)]


def _without_ids(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: block[name] for name in block if name not in ("id", "citations", "caller")} for block in blocks]
