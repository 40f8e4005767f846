"""A chat as JSON for the renderer of a worker: the fields of vLLM's chat request, as a caller would send them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.api.outcomes import CallError, invalid
from cluster.gateway.calls.tools import REASONING_EFFORTS, arguments_text


def chat_json(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> bytes:
    """Return a chat as JSON for the renderer of a worker. The arguments are those of ChatTemplate.render. Raises
    CallError for a text with a lone surrogate."""
    arguments = dict(template_kwargs or {})
    chat: dict[str, Any] = {"messages": [_message(message) for message in messages]}
    if tools:
        chat["tools"] = list(tools)
    if documents := arguments.pop("documents", None):
        chat["documents"] = documents
    if effort := _effort(arguments):
        chat["reasoning_effort"] = effort
    if arguments:
        chat["chat_template_kwargs"] = arguments
    if continue_final_message:
        chat["continue_final_message"] = True
    if not add_generation_prompt or continue_final_message:
        chat["add_generation_prompt"] = False
    try:
        return json.dumps(chat, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _no_unicode() from None


def _no_unicode() -> CallError:
    return invalid("messages", "the text is not valid Unicode (a lone surrogate): send well-formed text")


def _effort(arguments: dict[str, Any]) -> str:
    """Remove the arguments that calls/tools.py has derived from the caller's reasoning effort, and return the effort;
    "" if the caller gave none. vLLM derives the same arguments from the effort again."""
    effort = arguments.get("reasoning_effort")
    if not isinstance(effort, str) or effort not in REASONING_EFFORTS or "enable_thinking" not in arguments:
        return ""
    del arguments["reasoning_effort"]
    if arguments["enable_thinking"] is (effort != "none"):
        del arguments["enable_thinking"]
    return effort


def _message(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message in the form in which a caller sends it: the arguments of tool calls are text. Two keys are left
    out: `content` if it is None, and `reasoning_content`, which repeats the reasoning."""
    if len(message) == 2 and message.get("content") is not None:
        return message
    dropped = {"reasoning_content"} | ({"content"} if message.get("content") is None else set())
    out = {name: value for name, value in message.items() if name not in dropped}
    if calls := out.get("tool_calls"):
        out["tool_calls"] = [_call(call) for call in calls]
    return out


def _call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": arguments_text(function["arguments"])}}
