"""The tools in a request are checked, and then converted to the request for a worker's parsers. Every error names the
field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.outcomes import CallError
from cluster.gateway.calls.request import ChatPrompt
from cluster.gateway.calls.tool_call_ids import numbered_id
from cluster.gateway.calls.tools import (
    MAX_TOOL_DEPTH,
    MAX_TOOLS,
    MAX_TOOLS_BYTES,
    check_choice,
    check_effort,
    check_tools,
    function_tool,
    named_choice,
    output_options,
    parser_request,
    template_arguments,
    tool_calls_of,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def nested(levels: int) -> dict[str, Any]:
    """Return a JSON schema with `levels` levels of nesting."""
    schema: dict[str, Any] = {}
    for _ in range(levels - 1):
        schema = {"items": schema}
    return schema


RECURSIVE: dict[str, Any] = {
    "type": "object",
    "properties": {"child": {"$ref": "#"}, "other": {"$ref": "#/$defs/node"}},
    "$defs": {"node": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
}
BAD: list[tuple[list[Any], str]] = [
    ([function_tool("f", None, None)] * 2, "tools[1].function.name"),
    ([function_tool(None, None, None)], "tools[0].function.name"),
    ([function_tool("", None, None)], "tools[0].function.name"),
    ([function_tool("a b", None, None)], "tools[0].function.name"),
    ([function_tool("天気", None, None)], "tools[0].function.name"),
    ([function_tool("f\n", None, None)], "tools[0].function.name"),
    ([function_tool("f" * 129, None, None)], "tools[0].function.name"),
    ([function_tool("f", 1, None)], "tools[0].function.description"),
    ([function_tool("f", None, "{}")], "tools[0].function.parameters"),
    ([function_tool("f", None, [])], "tools[0].function.parameters"),
    ([function_tool("f", None, nested(MAX_TOOL_DEPTH + 1))], "tools[0].function.parameters"),
    ([function_tool("f", None, {}, "yes")], "tools[0].function.strict"),
    ([function_tool(f"f{i}", None, None) for i in range(MAX_TOOLS + 1)], "tools"),
]


@pytest.mark.parametrize(("tools", "field"), BAD)
def test_a_wrong_tool_is_named(tools: list[Any], field: str) -> None:
    """The error for an invalid tool is short and names the field."""
    with pytest.raises(CallError) as raised:
        check_tools("tools", tools)
    assert [v.field for v in raised.value.violations] == [field]
    assert len(raised.value.message) < 400


def test_valid_tools_pass() -> None:
    """Names with dots, recursive schemas, the largest depth and the largest number of tools are accepted."""
    check_tools("tools", [function_tool("math.f-1", "x", RECURSIVE, False), function_tool("g", None, None)])
    check_tools("tools", [function_tool("f", None, nested(MAX_TOOL_DEPTH))])
    check_tools("tools", [function_tool(f"f{i}", None, {}) for i in range(MAX_TOOLS)])


@given(JSON)
def test_any_parameters_are_an_object_or_refused(parameters: Any) -> None:
    """A tool's `parameters` must be an object or null. Any other JSON value gives an error that names the field
    `parameters`."""
    tools = [function_tool("f", None, parameters)]
    if isinstance(parameters, dict | None):
        check_tools("tools", tools, inner="")
        return
    with pytest.raises(CallError) as raised:
        check_tools("tools", tools, inner="")
    assert raised.value.violations[0].field == "tools[0].parameters"


TOOLS = [function_tool("f", None, {"type": "object"}), function_tool("g", "Ünï", None, True)]


@pytest.mark.parametrize(
    ("tools", "choice", "passes"),
    [
        ([], "none", True),
        ([], "auto", False),
        ([], "required", False),
        ([], named_choice("f"), False),
        (TOOLS, "none", True),
        (TOOLS, "auto", True),
        (TOOLS, "required", True),
        (TOOLS, "any", False),
        (TOOLS, named_choice("g"), True),
        (TOOLS, named_choice("h"), False),
    ],
)
def test_a_choice_needs_its_tools(tools: list[Any], choice: Any, passes: bool) -> None:
    """Every tool choice except `none` needs tools. A function that the choice names must be among them, as in vLLM."""
    if passes:
        check_choice(tools, choice)
        return
    with pytest.raises(CallError, match="tool_choice"):
        check_choice(tools, choice)


def test_an_unknown_effort_is_refused() -> None:
    """A reasoning effort that vLLM does not know is refused, and the error lists the known ones."""
    check_effort("")
    check_effort("xhigh")
    with pytest.raises(CallError, match="minimal, low, medium"):
        check_effort("huge")


@pytest.mark.parametrize(
    ("given_", "effort", "expected"),
    [
        ({"a": None, "b": "auto", "c": 0}, "", {"c": 0}),
        ({}, "none", {"reasoning_effort": "none", "enable_thinking": False}),
        ({}, "low", {"reasoning_effort": "low", "enable_thinking": True}),
        ({"reasoning_effort": "high"}, "low", {"reasoning_effort": "low", "enable_thinking": True}),
        ({"enable_thinking": False}, "low", {"reasoning_effort": "low", "enable_thinking": False}),
        ({"enable_thinking": None}, "low", {"reasoning_effort": "low"}),
    ],
)
def test_template_arguments_are_merged_as_in_vllm(given_: Any, effort: str, expected: Any) -> None:
    """The request's reasoning effort replaces the template argument `reasoning_effort`. It also sets the argument
    `enable_thinking` if the caller has not given this argument. Arguments with the value null or "auto" are removed."""
    assert template_arguments(given_, effort) == expected


@pytest.mark.slow
@given(st.lists(st.builds(function_tool, st.just("f"), st.text(), st.none() | st.dictionaries(st.text(), JSON))), JSON)
def test_the_parser_request_is_json_with_the_fields(tools: list[Any], argument: Any) -> None:
    """The request to the parsers is a JSON object with unchanged tools. Of the template arguments it has only those
    that are strings, numbers or booleans."""
    text = parser_request(
        tools,
        named_choice("f"),
        parallel_tool_calls=False,
        template_kwargs={"x": argument},
        reasoning_effort="low",
    )
    fields = json.loads(text)
    assert fields.pop("tools", []) == tools
    flags = fields.pop("chat_template_kwargs", {})
    assert flags == ({"x": argument} if isinstance(argument, str | int | float) else {})
    assert fields == {
        "tool_choice": named_choice("f"),
        "parallel_tool_calls": False,
        "reasoning_effort": "low",
    }


def test_the_parser_request_is_bounded() -> None:
    """Tools of more than a megabyte are refused. The size is counted in bytes of UTF-8. Template arguments, however
    large, add little to the request that is sent to the parser."""

    def request(description: str, arguments: dict[str, Any] | None = None) -> str:
        tools = [function_tool("f", description, None)]
        return output_options(ChatPrompt([], arguments or {}, tools=tools), "auto").parser_request

    spare = MAX_TOOLS_BYTES - 200
    assert len(request("x" * spare)) > spare
    for text in ("x" * MAX_TOOLS_BYTES, "é" * (spare // 2 + 200)):
        with pytest.raises(CallError, match="tools: have"):
            request(text)
    assert len(request("", {f"k{i}": "x" * 1000 for i in range(1000)} | {"y": [1] * 100_000})) < 300
    assert len(request("", {f"k{i}": 1 for i in range(100_000)})) < 2000


@pytest.mark.parametrize(
    ("tools", "choice", "needs"), [(TOOLS, "auto", True), (TOOLS, "none", False), ([], "none", False)]
)
def test_only_a_call_that_may_call_tools_needs_a_parser(tools: list[Any], choice: str, needs: bool) -> None:
    """A call needs a parser of tool calls if it has tools and its tool choice is not `none`. `tool_calls_before` is the
    number of tool calls that the assistant made earlier in the conversation."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "user", "content": "", "tool_calls": [call]},
    ]
    options = output_options(ChatPrompt(messages, tools=tools), choice, is_whole=True)
    assert (options.needs_tools, options.is_whole) == (needs, True)
    assert options.tool_calls_before == 2


@pytest.mark.slow
def test_kimis_ids_are_vllms() -> None:
    """The ids of Kimi's tool calls equal those of vLLM's server. An id contains the number of earlier tool calls, which
    is counted as in vLLM."""
    from vllm.parser.utils import count_chat_history_tool_calls
    from vllm.renderers.chat_utils import make_tool_call_id

    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    messages: list[Any] = [
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "assistant", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    assert tool_calls_of(messages) == count_chat_history_tool_calls(messages) == 3
    assert numbered_id("f.g", 3) == make_tool_call_id("kimi_k2", "f.g", 3)
