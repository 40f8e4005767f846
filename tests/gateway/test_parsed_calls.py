"""Calls with tools and reasoning through a real gateway and real links. All parts of an output reach the caller on
every API, even if workers or the caller's stream are lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.api.output_parts import OutputPart, PartKind
from cluster.client.answers import StreamState
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from cluster.wire.dial import read
from tests.support.calls import chat, refused, rest_of, resume
from tests.support.cluster import TestCluster, Worker, running_cluster
from tests.support.http import chat_body, client, fetch
from tests.support.parsed_outputs import ParsedByEngine
from tests.support.parts_engine import PartsEngine

pytestmark = pytest.mark.slow

ARGUMENTS = ['{"city": ', '"Zürich"', ', "days"', ": 3}"]
SCRIPT: list[list[OutputPart]] = [
    [OutputPart(PartKind.REASONING, "Let me ")],
    [OutputPart(PartKind.REASONING, "think.")],
    [],
    [OutputPart(PartKind.CONTENT, "I look it up.")],
    [],
    [OutputPart(PartKind.TOOL_NAME, "weather")],
    *([OutputPart(PartKind.TOOL_ARGUMENTS, text)] for text in ARGUMENTS),
    [OutputPart(PartKind.TOOL_NAME, "time", 1), OutputPart(PartKind.TOOL_ARGUMENTS, "{", 1)],
    [OutputPart(PartKind.TOOL_ARGUMENTS, "}", 1)],
    [],
]
EXPECTED = {
    "role": "assistant",
    "content": "I look it up.",
    "reasoning_content": "Let me think.",
    "tool_calls": [("weather", "".join(ARGUMENTS)), ("time", "{}")],
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("weather", "time")
]
PB_TOOLS = [pb.Tool(name=name, parameters_json='{"type": "object"}') for name in ("weather", "time")]


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[TestCluster]:
    """Start a gateway without workers."""
    async with running_cluster(tmp_path) as running:
        yield running


async def add(cluster: TestCluster, bundle: Bundle, **options: Any) -> Worker:
    """Add a worker that gives every call the output of SCRIPT."""
    parser = ParsedByEngine() if options.get("parses", True) else None
    return await cluster.add_worker(PartsEngine(SCRIPT, reasoning_tokens=2, **options), bundle, parser=parser)


def request(**fields: Any) -> pb.ChatRequest:
    """Return a chat with tools."""
    return chat(max_tokens=50, tools=PB_TOOLS, **fields)


def shown(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with only the name and the arguments of each tool call."""
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def joined(chunks: Sequence[pb.ChatChunk]) -> StreamState:
    """Return the state of a stream after these chunks."""
    state = StreamState("")
    for chunk in chunks:
        state._record(chunk)
    return state


async def test_every_api_shows_the_parts(cluster: TestCluster, bundle: Bundle) -> None:
    """Whole and streamed answers, over gRPC and over OpenAI's API, have the same content, reasoning and tool calls.
    Each tool call has its own id."""
    await add(cluster, bundle)
    whole = (await cluster.stub.Chat(request())).choices[0]
    assert (whole.message.content, whole.message.reasoning_content) == (
        EXPECTED["content"],
        EXPECTED["reasoning_content"],
    )
    assert [(call.name, call.arguments) for call in whole.message.tool_calls] == EXPECTED["tool_calls"]
    assert whole.finish_reason == "tool_calls"
    stream = joined([chunk async for chunk in cluster.stub.StreamChat(request())])
    assert shown(stream.message) == EXPECTED
    assert stream.finish_reason == "tool_calls"
    assert stream.usage is not None
    assert (stream.usage.completion_tokens, stream.usage.reasoning_tokens) == (len(SCRIPT), 2)
    async with client(cluster) as ai:
        body: dict[str, Any] = {**chat_body(max_tokens=50), "tools": TOOLS}
        answer: Any = await ai.chat.completions.create(**body)
        chunks: list[Any] = [chunk async for chunk in await ai.chat.completions.create(**body, stream=True)]
    message = answer.choices[0].message.model_dump(exclude_none=True)
    assert shown({key: message[key] for key in EXPECTED}) == EXPECTED
    assert answer.usage.completion_tokens_details.reasoning_tokens == 2
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == EXPECTED["content"]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == EXPECTED["reasoning_content"]
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert [call.function.name for call in calls if call.id] == ["weather", "time"]
    assert "".join(call.function.arguments for call in calls if call.index == 0) == "".join(ARGUMENTS)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    ids = {call.id for call in answer.choices[0].message.tool_calls} | {call.id for call in calls if call.id}
    assert len(ids) == 4


async def test_a_lost_worker_changes_nothing(cluster: TestCluster, bundle: Bundle) -> None:
    """The caller gets each part once, at whatever point of the output the worker is lost."""
    for cut in range(1, len(SCRIPT) - 1):
        doomed = await add(cluster, bundle, step_s=0.005)
        call = cluster.stub.StreamChat(request())
        chunks: list[pb.ChatChunk] = []
        while len(chunks) < min(cut, 9):
            chunks.append(await asyncio.wait_for(read(call), 60))
        await doomed.stop()
        survivor = await add(cluster, bundle)
        chunks += await rest_of(call)
        assert shown(joined(chunks).message) == EXPECTED, cut
        ids = [delta.id for chunk in chunks for choice in chunk.choices for delta in choice.delta.tool_calls]
        assert len(list(filter(None, ids))) == 2
        await survivor.stop()


@pytest.mark.parametrize("options", [{"parses": False}, {"tool_parser": "mistral"}], ids=["none", "another"])
async def test_a_worker_with_another_parser_does_not_continue(
    cluster: TestCluster, bundle: Bundle, options: dict[str, Any]
) -> None:
    """A stream that loses its worker resumes only on a worker with the same parsers. Other parsers would split the same
    tokens into different parts."""
    doomed = await add(cluster, bundle, step_s=0.005)
    call = cluster.stub.StreamChat(request())
    chunks = [await asyncio.wait_for(read(call), 60) for _ in range(4)]
    other = await add(cluster, bundle, **options)
    await doomed.stop()
    survivor = await add(cluster, bundle)
    chunks += await rest_of(call)
    assert shown(joined(chunks).message) == EXPECTED
    assert isinstance(survivor.engine, PartsEngine)
    assert survivor.engine.requests
    await other.stop()


async def test_a_resumed_stream_has_the_same_tool_calls(cluster: TestCluster, bundle: Bundle) -> None:
    """A caller that resumes a broken stream gets the remaining parts, and its tool calls keep their ids."""
    await add(cluster, bundle)
    undisturbed = [chunk async for chunk in cluster.stub.StreamChat(request(resumable=True))]
    expected = joined(undisturbed)
    for kept in range(1, len(undisturbed) - 1):
        chunks = undisturbed[:kept]
        chunks = chunks + [
            message.chat async for message in cluster.stub.Resume(resume(request(resumable=True), chunks))
        ]
        assert joined(chunks).message == expected.message, kept
        assert joined(chunks).finish_reason == "tool_calls"


async def test_kimis_tool_calls_are_numbered(cluster: TestCluster, bundle: Bundle) -> None:
    """With a parser of Kimi's models, the id of a tool call is made of the function's name and the call's number in the
    conversation. This holds on every API and after a resume."""
    await add(cluster, bundle, tool_parser="kimi_k2")
    earlier = [pb.ToolCall(id=f"functions.time:{i}", name="time", arguments="{}") for i in range(2)]
    asked = request(resumable=True)
    asked.messages.add(role="assistant", tool_calls=earlier)
    asked.messages.add(role="tool", content="now", tool_call_id="functions.time:0")
    expected = ["functions.weather:2", "functions.time:3"]
    whole = (await cluster.stub.Chat(asked)).choices[0].message
    assert [call.id for call in whole.tool_calls] == expected
    chunks = [chunk async for chunk in cluster.stub.StreamChat(asked)]
    assert [call["id"] for call in joined(chunks).message["tool_calls"]] == expected
    for kept in range(1, len(chunks) - 1):
        rest = [message.chat async for message in cluster.stub.Resume(resume(asked, chunks[:kept]))]
        assert [call["id"] for call in joined(chunks[:kept] + rest).message["tool_calls"]] == expected
    two = await cluster.stub.Chat(request(n=2))
    of_choices = [[call.id for call in choice.message.tool_calls] for choice in two.choices]
    assert of_choices == [["functions.weather:0", "functions.time:1"]] * 2
    body = {**chat_body(max_tokens=50), "tools": TOOLS}
    for number in (0, 2):
        answer = (await fetch(cluster, "/v1/chat/completions", body)).json["choices"][0]["message"]
        ids = [call["id"] for call in answer["tool_calls"]]
        assert ids == [f"functions.weather:{number}", f"functions.time:{number + 1}"]
        body["messages"] = [*body["messages"], answer]


async def test_a_worker_without_a_parser(cluster: TestCluster, bundle: Bundle) -> None:
    """A worker without a parser serves a chat without tools as plain text. A chat with tools is refused with the field
    name and a remedy."""
    await add(cluster, bundle, parses=False)
    answer = await cluster.stub.Chat(chat(max_tokens=50))
    assert answer.choices[0].message.content
    error = await refused(cluster.stub.Chat(request()))
    assert error.fields == ["tools"]
    assert "tool_call_parser" in error.message


async def test_parsing_is_asked_for(cluster: TestCluster, bundle: Bundle) -> None:
    """The worker gets the tools, the tool choice and the stop strings of a call."""
    worker = await add(cluster, bundle)
    choice = pb.ToolChoice(mode="function", name="time")
    await cluster.stub.Chat(request(tool_choice=choice, parallel_tool_calls=False, stop=["END"]))
    assert isinstance(worker.engine, PartsEngine)
    parsing = worker.engine.requests[-1].parsing
    assert parsing is not None
    asked = json.loads(parsing.request)
    assert [tool["function"]["name"] for tool in asked["tools"]] == ["weather", "time"]
    assert asked["tool_choice"]["function"]["name"] == "time"
    assert asked["parallel_tool_calls"] is False
    assert (parsing.stop, parsing.is_whole, parsing.needs_tools) == (("END",), True, True)
