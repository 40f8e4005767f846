"""Parsing of the messages of a chat into the form of ChatPrompt.messages.

A chat template gets the same fields as from vLLM 0.32 (`renderers/chat_utils.py`). Other fields of a message are
ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.api.outcomes import invalid, quoted
from cluster.gateway.apis.openai.fields import Fields, unsupported
from cluster.gateway.calls.request import MAX_MESSAGES
from cluster.gateway.calls.tools import call_arguments

ROLES = ("system", "developer", "user", "assistant", "tool")
_UNSERVED = ("audio", "function_call", "task", "tools")
"""Fields of a message that would change the prompt and are not supported."""
_TEXT_PARTS = ("text", "refusal", "thinking")
"""Types of parts that are text. The text of a part is in the field that has the type's name."""


def messages_of(body: Fields) -> list[Mapping[str, Any]]:
    """Return the messages of a chat. Raises CallError."""
    body.at_most(MAX_MESSAGES, "messages", "messages")
    values = body.array("messages")
    if not values:
        raise invalid("messages", "must not be empty")
    return [value if _is_plain(value) else _message(body.member("messages", i)) for i, value in enumerate(values)]


def _is_plain(value: Any) -> bool:
    """Return whether a message has only a valid role and a text, in this order. Such a message needs no conversion."""
    if type(value) is not dict or len(value) != 2 or next(iter(value)) != "role":
        return False
    return type(value.get("content")) is str and value["role"] in ROLES


def _message(message: Fields) -> dict[str, Any]:
    role = message.text("role")
    if role not in ROLES:
        raise invalid(message.path("role"), f"must be one of {', '.join(ROLES)}; got {quoted(role)}")
    for name in _UNSERVED:
        if message.values.get(name) is not None:
            raise unsupported(message.path(name))
    out: dict[str, Any] = {"role": role, "content": _content(message)}
    message.at_most(MAX_MESSAGES, "tool calls", "tool_calls")
    calls, reasoning, call_id = message.objects("tool_calls"), _reasoning(message), message.text("tool_call_id")
    if role == "assistant":
        if calls:
            out["tool_calls"] = [_tool_call(call) for call in calls]
        if reasoning is not None:
            out["reasoning"] = out["reasoning_content"] = reasoning
    elif role == "tool" and call_id is not None:
        out["tool_call_id"] = call_id
    if (name_ := message.text("name")) is not None:
        out["name"] = name_
    return out


def _reasoning(message: Fields) -> str | None:
    """Return the reasoning of a message. `reasoning_content` is the older name of the field."""
    reasoning, older = message.text("reasoning"), message.text("reasoning_content")
    return older if reasoning is None else reasoning


def _content(message: Fields) -> str | list[dict[str, str]] | None:
    """Return the content of a message: a text, a list of text parts, or None."""
    value = message.values.get("content")
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise message.wrong("content", "a string or an array of parts")
    message.at_most(MAX_MESSAGES, "parts", "content")
    return [{"type": "text", "text": _text(message, i, part)} for i, part in enumerate(value)]


def _text(message: Fields, i: int, value: object) -> str:
    """Return the text of a part. A string counts as a text part, as in vLLM."""
    if isinstance(value, str):
        return value
    part = message.member("content", i)
    type_ = part.text("type")
    if type_ is None:
        raise invalid(part.path("type"), "is missing; give a part of type text")
    if type_ not in _TEXT_PARTS:
        raise unsupported(part.path("type"), f"{quoted(type_)} parts are not supported; send text parts")
    text = part.text(type_)
    if text is None:
        raise invalid(part.path(type_), "is missing")
    return text


def _tool_call(call: Fields) -> dict[str, Any]:
    """Return a tool call from the chat's history, with its fields in the order in which vLLM passes them to a
    template."""
    if (type_ := call.text("type")) not in (None, "function"):
        raise unsupported(call.path("type"), f"{quoted(type_)} calls are not supported; send calls of functions")
    function = call.object("function")
    if function is None:
        raise invalid(call.path("function"), "is missing")
    name = function.text("name")
    if name is None:
        raise invalid(function.path("name"), "is missing")
    arguments = call_arguments(function.path("arguments"), function.text("arguments") or "")
    return {"id": call.text("id") or "", "function": {"arguments": arguments, "name": name}, "type": "function"}
