"""Bodies of Anthropic's Messages API give the same generation requests as equivalent bodies of OpenAI's API. The error
for an invalid body names the field that is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.apis.anthropic.requests import NAMES, PARSERS, parse_count, parse_messages
from cluster.gateway.apis.body_parser import BodyReader
from cluster.gateway.apis.openai.fields import Fields
from cluster.gateway.calls.request import ChatPrompt, GenerationRequest, PackedPrompt, check_options
from tests.support.http import message_body

READER = BodyReader()
USER = {"role": "user", "content": "Hi"}
TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {"x": {"type": "integer"}}}}
USE = {"type": "tool_use", "id": "toolu_abc123XYZ", "name": "f", "input": {"x": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_abc123XYZ", "content": "42"}


def parsed(**fields: Any) -> GenerationRequest:
    """Return the generation request that a body with these fields gives."""
    return parse_messages(Fields(message_body(**fields))).requests[0]


def prompt_of(*messages: dict[str, Any], **fields: Any) -> ChatPrompt:
    """Return the prompt that a body with these messages gives."""
    prompt = parsed(messages=list(messages), **fields).prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt


def text(*texts: str, **fields: Any) -> list[dict[str, Any]]:
    """Return one text block for each text, all with these additional fields."""
    return [{"type": "text", "text": text, **fields} for text in texts]


def test_a_conversation_with_tools_becomes_that_of_openai() -> None:
    """A tool_use becomes a tool call of the assistant, with its arguments as a mapping and its id without the prefix. A
    tool_result becomes a message of the role tool, before the user's text. Thinking becomes the reasoning."""
    answer = [{"type": "thinking", "thinking": "hm", "signature": ""}, *text("a", "b"), USE]
    answer.insert(1, {"type": "redacted_thinking", "data": "xx"})
    prompt = prompt_of(
        {"role": "user", "content": text("one", "two", cache_control={"type": "ephemeral"})},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": [*text("now"), RESULT]},
        tools=[TOOL],
        system=text("be ", "brief"),
    )
    call = {"id": "abc123XYZ", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    thought = {"reasoning": "hm", "reasoning_content": "hm"}
    assert prompt.messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": text("one", "two")},
        {"role": "assistant", "content": text("a", "b"), "tool_calls": [call], **thought},
        {"role": "tool", "tool_call_id": "abc123XYZ", "content": "42"},
        {"role": "user", "content": "now"},
    ]
    function = {"name": "f", "description": "d", "parameters": TOOL["input_schema"]}
    assert prompt.tools == [{"type": "function", "function": function}]
    assert prompt.add_generation_prompt


@pytest.mark.parametrize(
    ("content", "shown"),
    [("x", "x"), (text("a", "b"), "a\nb"), (None, ""), ([], "")],
    ids=["string", "blocks", "none", "empty"],
)
def test_the_content_of_a_tool_result(content: Any, shown: str) -> None:
    """The content of a tool result may be a string, a list of text blocks, or absent. A user message that holds only a
    tool result adds no user message to the prompt."""
    result = {**RESULT, "content": content, "is_error": True}
    prompt = prompt_of(USER, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [result]})
    assert prompt.messages[2:] == [{"role": "tool", "tool_call_id": "abc123XYZ", "content": shown}]


def test_an_answer_that_was_begun_is_continued() -> None:
    """If the last message is text of the assistant, the answer continues the text. A final tool call is not
    continued."""
    begun = prompt_of(USER, {"role": "assistant", "content": "Well"})
    assert (begun.continue_final_message, begun.add_generation_prompt) == (True, False)
    for content in ([USE], [*text("Well"), USE], text("")):
        called = prompt_of(USER, {"role": "assistant", "content": content})
        assert (called.continue_final_message, called.add_generation_prompt) == (False, True)


def test_system_texts() -> None:
    """System texts keep their place in the conversation. Anthropic's billing lines are left out."""
    header = "x-anthropic-billing-header: 1"
    for system in (text(header, "s"), text(f"{header}\ns"), f"{header}\ns", "s"):
        for late in (text(header, "now"), f"{header}\nnow"):
            prompt = prompt_of(USER, {"role": "system", "content": late}, system=system)
            assert [message["content"] for message in prompt.messages] == ["s", "Hi", "now"]
    assert prompt_of({"role": "system", "content": header}, USER, system=header).messages == [USER]


def test_options() -> None:
    """The options of a body become options of the generation request. check_options finds values out of range."""
    options = parsed(max_tokens=5, temperature=0.5, top_p=0.9, top_k=3, stop_sequences=["a", "b"]).options
    assert (options.max_tokens, options.temperature, options.top_p, options.top_k) == (5, 0.5, 0.9, 3)
    assert options.stop == ("a", "b")
    with pytest.raises(CallError) as raised:
        check_options(parsed(top_p=2, max_tokens=0, stop_sequences=[""]).options)
    assert {NAMES.get(v.field.partition("[")[0], v.field) for v in raised.value.violations} == {
        "max_tokens",
        "top_p",
        "stop_sequences",
    }


@pytest.mark.parametrize(
    ("thinking", "arguments", "budget"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, {"enable_thinking": True}, 1024),
        ({"type": "disabled"}, {"enable_thinking": False}, None),
        ({"type": "adaptive", "display": "omitted"}, {}, None),
        (None, {}, None),
    ],
)
def test_thinking(thinking: Any, arguments: dict[str, Any], budget: int | None) -> None:
    """The field `thinking` sets a template argument and the budget of reasoning tokens."""
    request = parsed(max_tokens=2000, thinking=thinking)
    assert isinstance(request.prompt, ChatPrompt)
    assert (request.prompt.template_kwargs, request.options.max_reasoning_tokens) == (arguments, budget)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ("auto", True)),
        ({"type": "auto"}, ("auto", True)),
        ({"type": "any", "disable_parallel_tool_use": True}, ("required", False)),
        ({"type": "none"}, ("none", True)),
        ({"type": "tool", "name": "f"}, ({"type": "function", "function": {"name": "f"}}, True)),
    ],
)
def test_tool_choices(choice: Any, expected: tuple[Any, bool]) -> None:
    """A tool choice reaches the worker's parser in OpenAI's form. A call that may not use tools needs no parser."""
    request = parsed(tools=[TOOL], tool_choice=choice)
    asked = json.loads(request.output.parser_request)
    assert (asked["tool_choice"], asked["parallel_tool_calls"]) == expected
    assert asked["tools"][0]["function"]["name"] == "f"
    assert request.output.needs_tools == (expected[0] != "none")
    assert request.output.is_whole


def test_an_answer_in_a_schema() -> None:
    """The schema of output_config becomes the grammar of the request. The effort of output_config becomes the reasoning
    effort of the template and the parser."""
    form = {"type": "json_schema", "schema": {"type": "object"}}
    request = parsed(output_config={"effort": "high", "format": form})
    assert request.options.grammar is not None
    assert (request.options.grammar.kind, json.loads(str(request.options.grammar.value))) == (
        "json_schema",
        {"type": "object"},
    )
    assert isinstance(request.prompt, ChatPrompt)
    assert request.prompt.template_kwargs["reasoning_effort"] == "high"
    assert json.loads(request.output.parser_request)["reasoning_effort"] == "high"


def test_hints_are_ignored() -> None:
    """Unknown fields, and fields without an effect on the answer, change nothing. A field that holds null counts as
    absent."""
    hints: dict[str, Any] = {"metadata": {"user_id": "u"}, "service_tier": "auto", "cache_control": {"type": "x"}}
    hints |= {"context_management": {"edits": [{"type": "clear_thinking_20251015"}]}, "unknown": [1], "container": "c"}
    hints |= {"mcp_servers": [], "tools": None, "system": None, "stop_sequences": None, "tool_choice": {"type": "auto"}}
    hints |= {"thinking": None, "output_config": {"effort": None, "format": None}, "inference_geo": "global"}
    assert parsed(**hints) == parsed()
    tool = {**TOOL, "cache_control": {"type": "ephemeral"}, "type": "custom", "eager_input_streaming": True}
    assert parsed(tools=[tool]) == parsed(tools=[TOOL])


def test_the_count_has_the_prompt_of_the_call() -> None:
    """count_tokens and a call make the same prompt from the same body."""
    body = message_body(
        messages=[USER, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [RESULT]}],
        tools=[TOOL],
        tool_choice={"type": "any"},
        system="s",
        thinking={"type": "disabled"},
        output_config={"effort": "low"},
        chat_template_kwargs={"a": 1},
    )
    counted = parse_count(Fields({name: body[name] for name in body if name != "max_tokens"})).requests[0]
    assert counted.prompt == parse_messages(Fields(body)).requests[0].prompt


IMAGE = {"type": "image", "source": {"type": "url", "url": "https://x"}}
THINKING = {"type": "enabled", "budget_tokens": 1024}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("no model", {"model": None}, "model"),
    ("place of the processing", {"inference_geo": "us"}, "inference_geo"),
    ("no max_tokens", {"max_tokens": None}, "max_tokens"),
    ("max_tokens of a wrong type", {"max_tokens": "5"}, "max_tokens"),
    ("no messages", {"messages": []}, "messages"),
    ("messages of a wrong type", {"messages": {}}, "messages"),
    ("only an empty message", {"messages": [{"role": "user", "content": []}]}, "messages"),
    ("too many messages", {"messages": [USER] * 10_001}, "messages"),
    ("message of a wrong type", {"messages": [USER, 5]}, "messages[1]"),
    ("unknown role", {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ("no content", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("content of a wrong type", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ("too many blocks", {"messages": [{"role": "user", "content": text("x") * 10_001}]}, "messages[0].content"),
    ("block of a wrong type", {"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
    ("block without type", {"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0].type"),
    ("block without text", {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
     "messages[0].content[0].text"),
    ("image", {"messages": [{"role": "user", "content": [*text("x"), IMAGE]}]}, "messages[0].content[1].type"),
    ("document", {"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0].type"),
    ("tool_use of the user", {"messages": [{"role": "user", "content": [USE]}]}, "messages[0].content[0].type"),
    ("tool_result of the assistant", {"messages": [{"role": "assistant", "content": [RESULT]}]},
     "messages[0].content[0].type"),
    ("tool_result without a tool_use", {"messages": [{"role": "user", "content": [RESULT]}]},
     "messages[0].content[0].tool_use_id"),
    ("tool_use without input", {"messages": [{"role": "assistant", "content": [{**USE, "input": None}]}]},
     "messages[0].content[0].input"),
    ("tool_use with a text as input", {"messages": [{"role": "assistant", "content": [{**USE, "input": "{}"}]}]},
     "messages[0].content[0].input"),
    ("tool_use without id", {"messages": [{"role": "assistant", "content": [{**USE, "id": ""}]}]},
     "messages[0].content[0].id"),
    ("image in a tool result",
     {"messages": [{"role": "assistant", "content": [USE]},
                   {"role": "user", "content": [{**RESULT, "content": [IMAGE]}]}]},
     "messages[1].content[0].content[0].type"),
    ("system of a wrong type", {"system": 5}, "system"),
    ("image in the system prompt", {"system": [IMAGE]}, "system[0].type"),
    ("temperature above 1", {"temperature": 1.5}, "temperature"),
    ("stop sequence of a wrong type", {"stop_sequences": [5]}, "stop_sequences[0]"),
    ("stream of a wrong type", {"stream": "yes"}, "stream"),
    ("server tool", {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ("tool without a schema", {"tools": [TOOL, {"name": "g"}]}, "tools[1].input_schema"),
    ("tool without a name", {"tools": [{"input_schema": {}}]}, "tools[0].name"),
    ("tool with a wrong name", {"tools": [{**TOOL, "name": "a b"}]}, "tools[0].name"),
    ("tools of one name", {"tools": [TOOL, TOOL]}, "tools[1].name"),
    ("deep schema", {"tools": [{**TOOL, "input_schema": json.loads('{"a":' * 100 + "1" + "}" * 100)}]},
     "tools[0].input_schema"),
    ("too many tools", {"tools": [TOOL] * 2000}, "tools"),
    ("strict of a wrong type", {"tools": [{**TOOL, "strict": 1}]}, "tools[0].strict"),
    ("choice without tools", {"tool_choice": {"type": "any"}}, "tool_choice"),
    ("unknown choice", {"tools": [TOOL], "tool_choice": {"type": "some"}}, "tool_choice.type"),
    ("choice of no tool", {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name"),
    ("choice of a wrong type", {"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
    ("unknown thinking", {"thinking": {"type": "on"}}, "thinking.type"),
    ("thinking without budget", {"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    ("budget above max_tokens", {"thinking": THINKING, "max_tokens": 1024}, "thinking.budget_tokens"),
    ("budget too small", {"thinking": {**THINKING, "budget_tokens": 5}}, "thinking.budget_tokens"),
    ("unknown effort", {"output_config": {"effort": "none"}}, "output_config.effort"),
    ("unknown format", {"output_config": {"format": {"type": "regex"}}}, "output_config.format.type"),
    ("format without schema", {"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ("skills", {"container": {"skills": [{"skill_id": "pptx"}]}}, "container.skills"),
    ("output_format", {"output_format": {"type": "json_schema"}}, "output_format"),
    ("MCP servers", {"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ("user id of a wrong type", {"metadata": {"user_id": 5}}, "metadata.user_id"),
    ("empty salt", {"cache_salt": ""}, "cache_salt"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "path"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_a_wrong_field_is_named(fields: dict[str, Any], path: str) -> None:
    """The error of an invalid or unsupported field names the path of the field in the caller's body."""
    with pytest.raises(CallError) as raised:
        parsed(**fields)
    assert raised.value.outcome in (Outcome.INVALID_FIELD, Outcome.UNSUPPORTED_FEATURE)
    assert raised.value.violations[0].field == path
    assert raised.value.message.startswith(f"{path}: ")


LARGE: list[tuple[str, dict[str, Any], str]] = [
    ("messages", {"messages": [USER] * 10_001}, "messages"),
    ("messages with blocks", {"messages": [{"role": "user", "content": text("x")}] * 20_000}, "messages"),
    ("blocks", {"messages": [{"role": "user", "content": text("x") * 40_000}]}, "messages"),
    ("deep messages", {"messages": json.loads("[" * 200 + "]" * 200)}, "messages"),
    ("dense schema", {"tools": [{**TOOL, "input_schema": {"a": [[]] * 40_000}}]}, "tools"),
    ("tools", {"tools": [TOOL] * 5000}, "tools"),
    ("system blocks", {"system": [IMAGE] * 5000}, "system"),
    ("stop sequences", {"stop_sequences": ["x"] * 5000}, "stop_sequences"),
    ("long stop sequence", {"stop_sequences": ["x" * 2000]}, "stop_sequences[0]"),
    ("metadata", {"metadata": {"user_id": "x" * 200_000}}, "metadata"),
]
"""Fields of large bodies, which a helper process parses."""


@pytest.mark.parametrize(("fields", "path"), [case[1:] for case in LARGE], ids=[case[0] for case in LARGE])
def test_a_wrong_field_of_a_large_body_is_named(fields: dict[str, Any], path: str) -> None:
    """The parser of large bodies refuses a body with too many values or too many levels, and names the field in the
    caller's body."""
    with pytest.raises(CallError) as raised:
        READER.http(json.dumps(message_body(**fields)).encode(), "messages")
    assert raised.value.outcome in (Outcome.INVALID_FIELD, Outcome.UNSUPPORTED_FEATURE)
    assert raised.value.violations[0].field == path


@pytest.mark.parametrize("name", ["messages", "count_tokens"])
def test_a_large_body_is_parsed_as_a_small_one(name: str) -> None:
    """The parser of large bodies returns the request that the parser of small bodies returns."""
    tools = [{**TOOL, "name": f"f{i}", "strict": True} for i in range(500)]
    body = message_body(
        messages=[USER, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [RESULT]}] * 1000,
        tools=tools,
        system=text("s" * 300_000),
        output_config={"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
        stream=True,
    )
    large = READER.http(json.dumps(body).encode(), name)
    small: Any = PARSERS[name](Fields(body))
    (request,) = large.requests
    assert isinstance(request.prompt, PackedPrompt)
    assert (replace(request, prompt=request.prompt.unpacked()), large.stream) == (small.requests[0], small.stream)
