"""Python values are converted to request messages, and errors name the invalid field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.client.requests import chat_request, complete_request, to_messages, tokenize_request
from cluster.v1 import inference_pb2 as pb


def test_openai_dictionaries_become_messages() -> None:
    """Messages as OpenAI dictionaries, with parts, images and tool calls, are converted to messages of the API."""
    assistant = {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": "{}"}}]}
    parts = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "u", "detail": "low"}}]
    assert to_messages([{"role": "user", "content": parts}, assistant, pb.Message(role="user", content="y")]) == [
        pb.Message(
            role="user",
            parts=[pb.ContentPart(text="see"), pb.ContentPart(image=pb.Image(url="u", detail="low"))],
        ),
        pb.Message(role="assistant", tool_calls=[pb.ToolCall(index=0, id="c1", name="f", arguments="{}")]),
        pb.Message(role="user", content="y"),
    ]


def test_tools_formats_and_template_arguments() -> None:
    """OpenAI's forms of tools, tool choice and response format are converted to the API's forms."""
    schema = {"type": "object"}
    request = chat_request(
        "m",
        "x",
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
            "chat_template_kwargs": {"enable_thinking": False},
        },
    )
    assert request.tools[0] == pb.Tool(name="f", parameters_json=json.dumps(schema), strict=True)
    assert request.tool_choice == pb.ToolChoice(mode="function", name="f")
    assert json.loads(request.response_format.json_schema) == schema
    assert json.loads(request.chat_template_kwargs_json) == {"enable_thinking": False}


def test_choice_and_plain_schema() -> None:
    """A list of choices, and a schema without OpenAI's wrapper, are passed on unchanged."""
    request = complete_request("m", "x", {"response_format": {"type": "choice", "choice": ["a", "b"]}})
    assert list(request.response_format.choice) == ["a", "b"]
    request = complete_request("m", "x", {"response_format": {"type": "json_schema", "json_schema": {"type": "null"}}})
    assert json.loads(request.response_format.json_schema) == {"type": "null"}


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"content": "x"}, r"messages\[0\]\.role: missing"),
        ({"role": "user", "contents": "x"}, r"messages\[0\]\.contents: unknown key"),
        ({"role": "user", "content": [{"type": "video"}]}, r"messages\[0\]\.content\[0\]\.type"),
    ],
)
def test_wrong_messages_name_their_field(message: dict[str, Any], field: str) -> None:
    """The error for an invalid message contains the path of the invalid key."""
    with pytest.raises(ValueError, match=field):
        to_messages([message])


def test_an_unknown_parameter_is_an_error() -> None:
    """A misspelt parameter, and a chat parameter in a completion request, raise TypeError."""
    wrong: Any = {"max_token": 3}
    with pytest.raises(TypeError, match="unknown parameter 'max_token'"):
        chat_request("m", "x", wrong)
    chat_only: Any = {"tools": []}
    with pytest.raises(TypeError, match="unknown parameter 'tools'"):
        complete_request("m", "x", chat_only)


def test_tokenize_takes_messages_with_tools() -> None:
    """The tools of a chat are sent with its messages, so that the token ids equal those of the chat's prompt."""
    messages = [{"role": "user", "content": "x"}]
    request = tokenize_request("m", messages, [{"type": "function", "function": {"name": "f"}}])
    assert request == pb.TokenizeRequest(model="m", messages=to_messages(messages), tools=[pb.Tool(name="f")])
