"""Requests with tools and reasoning. The gRPC API and the OpenAI API parse the same request, small or large, to the
same generation request."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.api.outcomes import CallError
from cluster.api.output_parts import OutputParsing
from cluster.gateway.apis import bodies
from cluster.gateway.apis.body_parser import BodyReader
from cluster.gateway.apis.grpc import requests as grpc_requests
from cluster.gateway.apis.openai.fields import read_object
from cluster.gateway.apis.openai.requests import parse_chat
from cluster.gateway.calls.meta import CallMeta
from cluster.gateway.calls.request import ChatPrompt, GenerationRequest, PackedPrompt
from cluster.gateway.calls.tools import MAX_TOOLS_BYTES
from cluster.gateway.scheduling.submission import MAX_SUBMIT_BYTES
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from tests.support.calls import chat, complete, refused
from tests.support.cluster import TestCluster, sim_engine, until
from tests.support.cpu import cpu_within
from tests.support.http import chat_body

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "child": {"$ref": "#"}}}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "é", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "noop"}},
]
PB_TOOLS = [
    pb.Tool(name="weather", description="é", parameters_json=json.dumps(SCHEMA), strict=True),
    pb.Tool(name="noop"),
]
ARGUMENTS = ['{"city": "Zürich"}', "", "[1]", "no JSON", "7"]


def read(**fields: Any) -> GenerationRequest:
    """Parse the body of a chat with these fields, and return its generation request."""
    return parse_chat(read_object(json.dumps(chat_body(**fields)).encode())).requests[0]


def unpacked(request: GenerationRequest) -> GenerationRequest:
    """Return a request from a helper process with its prompt unpacked."""
    assert isinstance(request.prompt, PackedPrompt)
    return replace(request, prompt=request.prompt.unpacked())


BODY: dict[str, Any] = {
    "tools": TOOLS,
    "tool_choice": {"type": "function", "function": {"name": "noop"}},
    "parallel_tool_calls": False,
    "reasoning_effort": "low",
    "thinking_token_budget": 7,
    "chat_template_kwargs": {"a": 1},
    "stream": True,
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": [
            {"id": str(i), "type": "function", "function": {"name": "weather", "arguments": text}}
            for i, text in enumerate(ARGUMENTS)]},
        {"role": "tool", "content": "x", "tool_call_id": "1", "name": "weather"},
    ],
}  # fmt: skip
MESSAGE = pb.ChatRequest(
    model="sim",
    temperature=0.0,
    max_tokens=16,
    tools=PB_TOOLS,
    tool_choice=pb.ToolChoice(mode="function", name="noop"),
    parallel_tool_calls=False,
    reasoning_effort="low",
    max_reasoning_tokens=7,
    chat_template_kwargs_json='{"a": 1}',
    messages=[
        pb.Message(role="user", parts=[pb.ContentPart(text="a"), pb.ContentPart(text="b")]),
        pb.Message(
            role="assistant",
            reasoning_content="r",
            tool_calls=[pb.ToolCall(id=str(i), name="weather", arguments=text) for i, text in enumerate(ARGUMENTS)],
        ),
        pb.Message(role="tool", content="x", tool_call_id="1", name="weather"),
    ],
)


def test_both_apis_make_the_same_request() -> None:
    """An HTTP body and a gRPC message with the same contents give equal requests, also if a helper process parses them.
    Arguments of an earlier tool call in the chat become an empty object if they are not a JSON object."""
    small = read(**BODY)
    assert small == grpc_requests.parse_chat(MESSAGE)
    reader = BodyReader()
    assert unpacked(reader.http(json.dumps(chat_body(**BODY)).encode(), "chat").requests[0]) == small
    assert unpacked(reader.message(MESSAGE.SerializeToString(), "StreamChat")) == small
    assert isinstance(small.prompt, ChatPrompt)
    calls = small.prompt.messages[1]["tool_calls"]
    assert [call["function"]["arguments"] for call in calls] == [{"city": "Zürich"}, {}, {}, {}, {}]
    asked = json.loads(small.output.parser_request)
    assert [tool["function"]["name"] for tool in asked["tools"]] == ["weather", "noop"]
    assert small.output.tool_calls_before == len(ARGUMENTS)
    assert small.options.max_reasoning_tokens == 7


@pytest.mark.parametrize(
    ("fields", "choice", "needs_tools"),
    [
        ({}, "none", False),
        ({"tools": TOOLS}, "auto", True),
        ({"tools": TOOLS, "tool_choice": None}, "auto", True),
        ({"tools": TOOLS, "tool_choice": "none"}, "none", False),
        ({"tools": TOOLS, "tool_choice": "required"}, "required", True),
    ],
)
def test_the_choice_has_vllms_defaults(fields: dict[str, Any], choice: str, needs_tools: bool) -> None:
    """Without the field `tool_choice`, a call with tools has the choice `auto`. With the choice `none`, the chat
    template still gets the tools."""
    output = read(**fields).output
    assert (json.loads(output.parser_request)["tool_choice"], output.needs_tools) == (choice, needs_tools)
    prompt = read(**fields).prompt
    assert isinstance(prompt, ChatPrompt)
    assert len(prompt.tools) == len(fields.get("tools", ()))


def test_only_whole_answers_are_parsed_whole() -> None:
    """A request is marked as whole if it is for an HTTP answer without streaming or for the gRPC method Chat. A request
    for a stream, or in a session, is not marked as whole."""
    assert read().output.is_whole
    assert not read(stream=True).output.is_whole
    assert grpc_requests.READ["Chat"].read(chat()).output.is_whole
    assert not grpc_requests.READ["StreamChat"].read(chat()).output.is_whole
    (start,) = grpc_requests.session_items(pb.SessionRequest(start=pb.SessionStart(call_id=1, chat=chat())))
    assert isinstance(start, grpc_requests.SessionStart)
    assert isinstance(start.request, GenerationRequest)
    assert not start.request.output.is_whole


def test_reasoning_fields_are_read() -> None:
    """A reasoning budget of -1 means no budget, reasoning can be hidden, and `reasoning` takes precedence over its
    older name."""
    assert read(thinking_token_budget=-1).options.max_reasoning_tokens is None
    assert read(thinking_token_budget=0).options.max_reasoning_tokens == 0
    assert read().output.include_reasoning
    assert not read(include_reasoning=False).output.include_reasoning
    turn = {"role": "assistant", "content": "x", "reasoning": "new", "reasoning_content": "old"}
    prompt = read(messages=[turn, {"role": "user", "content": "y", "reasoning": "z"}]).prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.messages[0]["reasoning"] == prompt.messages[0]["reasoning_content"] == "new"
    assert "reasoning" not in prompt.messages[1]


def test_tool_results_without_calls_are_accepted() -> None:
    """A tool result without its tool call is accepted, as in vLLM. The template decides how to render it."""
    prompt = read(messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}]).prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.messages[0] == {"role": "tool", "content": "x", "tool_call_id": "1"}


def test_tokenize_counts_tools() -> None:
    """Tokenize passes the tools of a chat to the template. Tools beside a plain text are refused."""
    request = pb.TokenizeRequest(model="sim", messages=MESSAGE.messages, tools=PB_TOOLS)
    asked = grpc_requests.tokenize_call(request).prompt
    of_chat = grpc_requests.parse_chat(MESSAGE).prompt
    assert isinstance(asked, ChatPrompt)
    assert isinstance(of_chat, ChatPrompt)
    assert (asked.tools, asked.messages) == (of_chat.tools, of_chat.messages)
    with pytest.raises(CallError, match="tools: need messages"):
        grpc_requests.tokenize_call(pb.TokenizeRequest(model="sim", text="x", tools=PB_TOOLS))


DENSE = '{"a":[' + "[]," * 400_000 + "[]]}"
LONG = '{"a":"' + "x" * (4 << 20) + '"}'


def call(arguments: str) -> dict[str, Any]:
    """Return a body with one tool call in the history."""
    function = {"name": "f", "arguments": arguments}
    return {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}]}


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"tools": [{"function": {"name": f"f{i}"}} for i in range(30_000)]}, "tools"),
        ({"tools": [{"function": {"name": "f", "description": "x" * MAX_TOOLS_BYTES}}]}, "tools"),
        ({"tools": [{"function": {"name": "f", "parameters": {"enum": [[]] * 60_000}}}]}, "tools"),
        ({"tool_choice": {"function": {"name": "x" * 1_000_000}}, "tools": TOOLS}, "tool_choice"),
        (call(DENSE), "messages[0].tool_calls[0].function.arguments"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 10_001}]}, "messages[0].content"),
        ({"messages": call("")["messages"][:1] * 10_001}, "messages"),
        ({"documents": [{"text": "x"}] * 10_001}, "documents"),
    ],
)
def test_bad_bodies_are_refused_soon(fields: dict[str, Any], path: str) -> None:
    """A body that is far too large in some way is refused in bounded time, and the error names the field."""
    body = json.dumps(chat_body(**fields)).encode()
    with cpu_within(1.0), pytest.raises(CallError) as raised:
        BodyReader().http(body, "chat")
    assert raised.value.violations[0].field == path
    assert len(raised.value.message) < 500


def test_long_arguments_are_accepted() -> None:
    """Arguments of several megabytes in the history are accepted, since a model may have written them."""
    request = unpacked(BodyReader().http(json.dumps(chat_body(**call(LONG))).encode(), "chat").requests[0])
    assert isinstance(request.prompt, ChatPrompt)
    (earlier,) = request.prompt.messages[0]["tool_calls"]
    assert earlier["function"]["arguments"] == json.loads(LONG)


@pytest.mark.parametrize(
    ("request_", "path"),
    [
        (chat(tools=[pb.Tool(name=f"f{i}") for i in range(5000)]), "tools"),
        (chat(tools=[pb.Tool(name="f", parameters_json=LONG)]), "tools"),
        (chat(tools=[pb.Tool(name="f", parameters_json=DENSE[:900_000])]), "tools[0].parameters_json"),
        (chat(tools=[pb.Tool(name="f", parameters_json="[" * 100_000)]), "tools[0].parameters_json"),
        (chat(tool_choice=pb.ToolChoice(mode="x" * 1_000_000), tools=PB_TOOLS), "tool_choice.mode"),
    ],
)
def test_bad_messages_are_refused_soon(request_: pb.ChatRequest, path: str) -> None:
    """A gRPC message with too many or too large tools is refused in bounded time, and the error names the field."""
    data = request_.SerializeToString()
    with cpu_within(1.0), pytest.raises(CallError) as raised:
        BodyReader().message(data, "Chat")
    assert raised.value.violations[0].field == path


def test_dense_schemas_are_not_parsed_on_the_event_loop() -> None:
    """A gRPC message with tools counts as small only if the JSON schemas in it have few values. Any other message is
    parsed in a helper process."""
    for parameters, small in (('{"x": "' + "y" * 16_000 + '"}', True), ('{"x": [' + "1," * 8000 + "1]}", False)):
        request = chat(tools=[pb.Tool(name=f"f{i}", parameters_json=parameters) for i in range(20)])
        assert bodies._is_small_message(pb.ChatRequest, request.SerializeToString()) == small


async def add_worker(cluster: TestCluster, checkpoint: Path, bundle: Bundle, *parsers: str, **parameters: int) -> str:
    """Link a worker with these parsers in its capabilities, and return its incarnation. `parameters`: of the simulated
    engine."""
    engine = sim_engine(checkpoint, **parameters)
    info = await engine.start()
    told = replace(info, capabilities=(*info.capabilities, *parsers))
    worker = await cluster.add_worker(engine, bundle, info=told)
    return worker.identity.incarnation


async def opened(cluster: TestCluster, request: GenerationRequest) -> tuple[OutputParsing | None, str]:
    """Open a call. Returns its parsing options and the worker that it was sent to."""
    async with cluster.gateway.service.open(request, CallMeta("id", "grpc")) as call:
        sequence = call.sequences[0]
        await until(lambda: bool(sequence.life.last_worker), "it is sent")
        return sequence.request.parsing, sequence.life.last_worker


async def test_a_call_with_tools_goes_to_a_worker_with_a_parser(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """A call with tools is refused at once if no worker has a parser. Otherwise it goes to a worker with a parser,
    together with the settings for the parser and the stop strings. A chat with tools whose tool choice is `none` is
    parsed too. A chat without tools is not parsed."""
    await add_worker(cluster, checkpoint, bundle)
    asked = chat(tools=PB_TOOLS, stop=["never so"])
    answer = await refused(cluster.stub.Chat(asked))
    assert (answer.reason, answer.fields) == ("UNSUPPORTED_FEATURE", ["tools"])
    assert "tool_call_parser" in answer.message
    await cluster.stub.Chat(chat(tools=PB_TOOLS, tool_choice=pb.ToolChoice(mode="none")))
    parses = await add_worker(cluster, checkpoint, bundle, "tools:hermes")
    for is_whole in (True, False) * 3:
        request = grpc_requests.parse_chat(asked, is_whole)
        expected = OutputParsing(request.output.parser_request, ("never so",), is_whole, True)
        assert await opened(cluster, request) == (expected, parses)
        none = grpc_requests.parse_chat(chat(tools=PB_TOOLS, tool_choice=pb.ToolChoice(mode="none")), is_whole)
        assert (await opened(cluster, none))[0] == OutputParsing(none.output.parser_request, is_whole=is_whole)
        for plain in (grpc_requests.parse_chat(chat()), grpc_requests.parse_complete(complete(stop=["never so"]))):
            assert (await opened(cluster, plain))[0] is None
    await cluster.until_idle()


async def test_a_chat_is_parsed_where_a_worker_parses_reasoning(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """If a worker of the model has a parser of reasoning, the outputs of all chats are parsed. Outputs of plain
    completions are not parsed."""
    await add_worker(cluster, checkpoint, bundle, "reasoning:qwen3")
    request = grpc_requests.parse_whole_chat(chat(max_reasoning_tokens=5))
    parsing, _ = await opened(cluster, request)
    assert parsing == OutputParsing(request.output.parser_request, is_whole=True)
    assert (await opened(cluster, grpc_requests.parse_complete(complete())))[0] is None
    await cluster.until_idle()


async def test_large_tools_can_be_sent(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """The size of the tools does not count against the size limit on the rest of a request. Tools are sent once for
    each output, so their size limits the number of outputs."""
    parameters = {"max_model_len": 300_000, "kv_blocks": 20_000, "max_num_batched_tokens": 300_000}
    worker = await add_worker(cluster, checkpoint, bundle, "tools:hermes", **parameters)
    tools = [pb.Tool(name="f", description="y" * 2 * MAX_SUBMIT_BYTES)]
    parsing, sent_to = await opened(cluster, grpc_requests.parse_chat(chat(tools=tools)))
    assert parsing is not None
    assert len(parsing.request) > 2 * MAX_SUBMIT_BYTES
    assert sent_to == worker
    answer = await refused(cluster.stub.Chat(chat(tools=tools, n=21)))
    assert answer.fields == ["n"]
    await cluster.until_idle()
