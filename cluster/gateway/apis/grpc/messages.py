"""Parsing of the messages, tools and tool choices of inference.proto. Each error names the path of the wrong field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any

from cluster.api.outcomes import CallError, Outcome, Violation, invalid, quoted
from cluster.gateway.apis.json_values import parse
from cluster.gateway.calls.request import MAX_MESSAGES
from cluster.gateway.calls.tools import (
    MAX_TOOLS,
    MAX_TOOLS_BYTES,
    ToolChoice,
    call_arguments,
    check_choice,
    check_tools,
    function_tool,
    named_choice,
)
from cluster.v1 import inference_pb2 as pb

ROLES = ("system", "developer", "user", "assistant", "tool")


def unsupported(field: str, what: str) -> CallError:
    """Return the error for a known field that this release does not support. `what`: the feature with its
    verb, for example "images are"."""
    return CallError(
        Outcome.UNSUPPORTED_FEATURE,
        f"{field}: {what} not in this release; leave it out",
        violations=[Violation(field, "not supported")],
    )


def check_count(name: str, values: Sized, most: int, what: str) -> None:
    """Raise CallError if a list has more than `most` elements. `name`: the field that holds the list. `what`: the
    elements in words, for the error."""
    if len(values) > most:
        raise invalid(name, f"at most {most} {what}, got {len(values)}")


def check_messages(messages: Sequence[pb.Message]) -> None:
    """Raise CallError if there are no messages or too many. Only the number of messages is checked."""
    if not messages:
        raise invalid("messages", "must not be empty")
    check_count("messages", messages, MAX_MESSAGES, "messages")


def messages_of(messages: Sequence[pb.Message]) -> list[dict[str, Any]]:
    """Return messages in the form of ChatPrompt.messages. Raises CallError."""
    return [_message(i, message) for i, message in enumerate(messages)]


def json_object(field: str, text: str) -> dict[str, Any]:
    """Parse the JSON text of a field as an object. Raises CallError."""
    value = parse(field, text)
    if not isinstance(value, dict):
        raise invalid(field, "must be a JSON object")
    return value


def _message(index: int, message: pb.Message) -> dict[str, Any]:
    role, content = message.role, message.content
    if role not in ROLES:
        raise invalid(f"messages[{index}].role", f"must be one of {', '.join(ROLES)}; got {quoted(role)}")
    out: dict[str, Any] = {"role": role, "content": content}
    at = f"messages[{index}]"
    if message.parts:
        if content:
            raise invalid(f"{at}.parts", "give either content or parts, not both")
        out["content"] = _text_parts(at, message.parts)
    if role == "assistant":
        if message.tool_calls:
            out["tool_calls"] = _tool_calls(at, message.tool_calls)
            out["content"] = out["content"] or None  # as OpenAI's clients send it
        if message.reasoning_content:
            out["reasoning"] = out["reasoning_content"] = message.reasoning_content
    elif role == "tool" and message.tool_call_id:
        out["tool_call_id"] = message.tool_call_id
    if message.name:
        out["name"] = message.name
    return out


def _text_parts(at: str, parts: Sequence[pb.ContentPart]) -> list[dict[str, str]]:
    check_count(f"{at}.parts", parts, MAX_MESSAGES, "parts")
    texts = []
    for i, part in enumerate(parts):
        kind = part.WhichOneof("part")
        if kind == "image":
            raise unsupported(f"{at}.parts[{i}].image", "images are")
        if kind is None:
            raise invalid(f"{at}.parts[{i}]", "is empty; give text")
        texts.append({"type": "text", "text": part.text})
    return texts


def _tool_calls(at: str, calls: Sequence[pb.ToolCall]) -> list[dict[str, Any]]:
    """Return the tool calls of a message, with their fields in the order in which vLLM passes them to a template."""
    check_count(f"{at}.tool_calls", calls, MAX_MESSAGES, "tool calls")
    out = []
    for i, call in enumerate(calls):
        arguments = call_arguments(f"{at}.tool_calls[{i}].arguments", call.arguments)
        out.append({"id": call.id, "function": {"arguments": arguments, "name": call.name}, "type": "function"})
    return out


def tools_of(tools: Sequence[pb.Tool]) -> list[dict[str, Any]]:
    """Return the tools of a request in the form of ChatPrompt.tools. Raises CallError."""
    if not tools:
        return []
    check_count("tools", tools, MAX_TOOLS, "tools")
    if (size := sum(len(tool.parameters_json) for tool in tools)) > MAX_TOOLS_BYTES:
        raise invalid("tools", f"have {size} characters of schemas; at most {MAX_TOOLS_BYTES} are allowed: send less")
    out = []
    for i, tool in enumerate(tools):
        text = tool.parameters_json
        parameters = json_object(f"tools[{i}].parameters_json", text) if text else None
        strict = tool.strict if tool.HasField("strict") else None
        out.append(function_tool(tool.name, tool.description or None, parameters, strict))
    check_tools("tools", out, inner="")
    return out


def choice_of(choice: pb.ToolChoice, tools: Sequence[Mapping[str, Any]]) -> ToolChoice:
    """Return the tool choice. The default is `auto` with tools and `none` without. Raises CallError."""
    match choice.mode:
        case "":
            return "auto" if tools else "none"
        case "function":
            found = named_choice(choice.name)
        case mode:
            found = mode
    check_choice(tools, found, "tool_choice.name" if choice.mode == "function" else "tool_choice.mode")
    return found
