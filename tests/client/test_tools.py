"""Python functions as tools: their schemas, their calls, and the streamed deltas of calls."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.client import Tool, ToolCall, run_calls
from cluster.client.answers import StreamState
from cluster.client.requests import chat_request
from cluster.v1 import inference_pb2 as pb


def weather(city: str, unit: Literal["c", "f"] = "c", days: list[int] | None = None) -> dict[str, Any]:
    """Return the weather of a city."""
    return {"city": city, "unit": unit, "days": days}


def test_a_function_becomes_a_tool() -> None:
    """A tool made from a function has its name, docstring and parameters, and can be sent in a request."""
    request = chat_request("m", "x", {"tools": [Tool(weather, strict=True)]})
    (tool,) = request.tools
    parameters = json.loads(tool.parameters_json)
    assert (tool.name, tool.description, tool.strict) == ("weather", "Return the weather of a city.", True)
    assert parameters["required"] == ["city"]
    assert parameters["properties"]["unit"]["enum"] == ["c", "f"]
    assert parameters["additionalProperties"] is False


@pytest.mark.parametrize(
    ("call", "result"),
    [
        (ToolCall("1", "weather", '{"city": "Rome", "days": [1]}'), '{"city": "Rome", "unit": "c", "days": [1]}'),
        (ToolCall("1", "weather", '{"city": 5}'), "error: wrong arguments"),
        (ToolCall("1", "weather", "[]"), "error: wrong arguments"),
        (ToolCall("1", "weather", "{"), "error: wrong arguments"),
        (ToolCall("1", "weather", '{"city": "Rome", "x": 1}'), "error: wrong arguments"),
        (ToolCall("1", "other", "{}"), "error: there is no tool other"),
    ],
)
def test_calls_are_run(call: ToolCall, result: str) -> None:
    """`run_calls` runs a tool call with valid arguments. For an invalid tool call, it returns a message that tells the
    model what is wrong."""
    (message,) = run_calls([Tool(weather)], [call])
    assert (message["role"], message["tool_call_id"]) == ("tool", "1")
    assert message["content"].startswith(result)


def variadic(*cities: str) -> str:
    """Accept arguments that have no names."""
    return ""


def untyped(city) -> str:  # type: ignore[no-untyped-def]
    """Accept an argument that has no type."""
    return ""


@pytest.mark.parametrize("function", [variadic, untyped])
def test_a_function_without_a_schema_is_refused(function: Any) -> None:
    """A function with a parameter that no schema can describe is refused, and the error names the parameter."""
    with pytest.raises(TypeError, match=r"parameter (cities|city)"):
        Tool(function)


calls = st.lists(
    st.builds(ToolCall, st.text("ab", min_size=1), st.text("fg", min_size=1), st.text('{}"x', max_size=9)), max_size=3
)


@given(st.data(), calls, st.text(max_size=5), st.text(max_size=5))
def test_deltas_make_the_message(data: st.DataObject, expected: list[ToolCall], reasoning: str, text: str) -> None:
    """The stream assembles the calls, the reasoning and the text, however the arguments are split over chunks."""
    deltas = [pb.Message(reasoning_content=reasoning), pb.Message(content=text)]
    for index, call in enumerate(expected):
        at = data.draw(st.integers(0, len(call.arguments)))
        deltas.append(pb.Message(tool_calls=[pb.ToolCall(index=index, id=call.id, name=call.name)]))
        deltas += [
            pb.Message(tool_calls=[pb.ToolCall(index=index, arguments=part)])
            for part in (call.arguments[:at], call.arguments[at:])
        ]
    state = StreamState("r")
    for delta in deltas:
        state._record(pb.ChatChunk(choices=[pb.ChoiceDelta(delta=delta)]))
    assert state.tool_calls == tuple(expected)
    message = state.message
    assert (message["content"], message.get("reasoning_content", "")) == (text, reasoning)
    assert message.get("tool_calls", []) == [call.as_dict() for call in expected]
