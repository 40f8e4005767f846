"""Tools and reasoning of a chat: checks, the form in which a chat template gets the tools, and the request to a
worker's parsers.

All APIs use these functions, so that equal requests give equal prompts. The forms and defaults are those of vLLM 0.32's
server (`ChatCompletionRequest`), so that a prompt equals the prompt that vLLM renders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from cluster.api.outcomes import invalid, quoted
from cluster.gateway.apis.json_values import NotJson, is_deeper, kind, parse
from cluster.gateway.calls.request import ChatPrompt, OutputOptions

MAX_TOOLS: Final = 1024
MAX_TOOLS_BYTES: Final = 1 << 20
"""Maximum size of the tools of one request, in bytes of JSON."""
MAX_TOOL_DEPTH: Final = 64
"""Maximum number of levels of objects and arrays in the parameters of a tool."""
MAX_PARSER_ARGUMENTS, MAX_PARSER_ARGUMENT_CHARS = 64, 256
"""Upper bounds on the template arguments that a parser gets: their number, and the characters of a name or a text."""
REASONING_EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
CHOICES: Final = ("auto", "none", "required")
_PLAIN_REQUEST: Final = '{"tool_choice": "none", "parallel_tool_calls": true}'
"""The request to the parsers for nearly all chats without tools."""
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_NAME_RULE = "must have 1 to 128 letters, digits and characters of _ - . : /"

ToolChoice = str | Mapping[str, Any]
"""One of CHOICES, or `{"type": "function", "function": {"name": ...}}`."""


def function_tool(
    name: object, description: object, parameters: object, strict: object = None, defer_loading: object = None
) -> dict[str, Any]:
    """Return a tool in the form that vLLM passes to a chat template. `description` and `parameters` are null if absent;
    the other fields are left out if absent. `check_tools` checks the values."""
    function = {"name": name, "description": description, "parameters": parameters}
    if strict is not None:
        function["strict"] = strict
    if defer_loading is not None:
        function["defer_loading"] = defer_loading
    return {"type": "function", "function": function}


def named_choice(name: str) -> ToolChoice:
    """Return the tool choice that forces a call of one function."""
    return {"type": "function", "function": {"name": name}}


def check_tools(path: str, tools: Sequence[Mapping[str, Any]], inner: str = ".function") -> None:
    """Check tools that `function_tool` has made. Raises CallError, which names the first wrong field.

    `inner`: the path from a tool to its function in the caller's request.
    """
    if len(tools) > MAX_TOOLS:
        raise invalid(path, f"at most {MAX_TOOLS} tools, got {len(tools)}: send fewer")
    first_of: dict[str, int] = {}
    for i, tool in enumerate(tools):
        function, at = tool["function"], f"{path}[{i}]{inner}"
        name, parameters = function["name"], function["parameters"]
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            raise invalid(f"{at}.name", f"{_NAME_RULE}; got {quoted(name) if isinstance(name, str) else kind(name)}")
        if first_of.setdefault(name, i) != i:
            raise invalid(f"{at}.name", f"{quoted(name)} is also the name of {path}[{first_of[name]}]: rename one")
        _check_types(at, function)
        if parameters is not None and is_deeper(parameters, MAX_TOOL_DEPTH):
            raise invalid(f"{at}.parameters", f"at most {MAX_TOOL_DEPTH} levels of nesting: flatten the schema")


def _check_types(at: str, function: Mapping[str, Any]) -> None:
    if not isinstance(function["description"], str | None):
        raise invalid(f"{at}.description", f"must be a string, got {kind(function['description'])}")
    if not isinstance(function["parameters"], dict | None):
        raise invalid(f"{at}.parameters", f"must be a JSON schema (an object), got {kind(function['parameters'])}")
    for name in ("strict", "defer_loading"):
        if not isinstance(function.get(name), bool | None):
            raise invalid(f"{at}.{name}", f"must be true or false, got {kind(function[name])}")


def check_choice(tools: Sequence[Mapping[str, Any]], choice: ToolChoice, field: str = "tool_choice") -> None:
    """Check a tool choice against the tools of the request. Raises CallError, which names `field`."""
    if choice == "none":
        return
    if not tools:
        raise invalid(field, "needs tools: give at least one tool, or leave tool_choice out")
    if isinstance(choice, str):
        if choice not in CHOICES:
            raise invalid(field, f"must be {', '.join(CHOICES)} or a function, got {quoted(choice)}")
        return
    name = choice["function"]["name"]
    if not any(tool["function"]["name"] == name for tool in tools):
        raise invalid(field, f"{quoted(name)} is not the name of a tool of this request")


def check_effort(effort: str, field: str = "reasoning_effort") -> None:
    """Check a reasoning effort; "" is allowed. Raises CallError."""
    if effort and effort not in REASONING_EFFORTS:
        raise invalid(field, f"must be one of {', '.join(REASONING_EFFORTS)}; got {quoted(effort)}")


def template_arguments(given: Mapping[str, Any], reasoning_effort: str) -> dict[str, Any]:
    """Return the arguments of the chat template as vLLM's server passes them. `given`: the caller's
    `chat_template_kwargs`.

    Arguments that are null or "auto" are dropped. `reasoning_effort` takes precedence over an argument of this name. It
    also sets the argument `enable_thinking`, if the caller has not set it.
    """
    arguments = {name: value for name, value in given.items() if value is not None and value != "auto"}
    if reasoning_effort:
        arguments["reasoning_effort"] = reasoning_effort
        if "enable_thinking" not in given:
            arguments["enable_thinking"] = reasoning_effort != "none"
    return arguments


def parser_request(
    tools: Sequence[Mapping[str, Any]],
    tool_choice: ToolChoice,
    *,
    parallel_tool_calls: bool,
    template_kwargs: Mapping[str, Any],
    reasoning_effort: str,
) -> str:
    """Return the JSON object for OutputParsing.request. Empty fields are left out.

    `template_kwargs`: the result of `template_arguments`, from which parsers read flags. An argument that is long or
    not a plain value is left out. Raises CallError for tools of more than MAX_TOOLS_BYTES.
    """
    plain = tool_choice == "none" and parallel_tool_calls
    if plain and not (tools or template_kwargs or reasoning_effort):
        return _PLAIN_REQUEST
    fields: dict[str, Any] = {"tool_choice": tool_choice, "parallel_tool_calls": parallel_tool_calls}
    if flags := _flags(template_kwargs):
        fields["chat_template_kwargs"] = flags
    if reasoning_effort:
        fields["reasoning_effort"] = reasoning_effort
    text = json.dumps(fields)
    if not tools:
        return text
    listed = json.dumps(tools, ensure_ascii=False)
    if 4 * len(listed) > MAX_TOOLS_BYTES and (size := len(listed.encode())) > MAX_TOOLS_BYTES:
        raise invalid("tools", f"have {size} bytes of JSON; at most {MAX_TOOLS_BYTES} are allowed: send less")
    return f'{{"tools": {listed}, {text[1:]}'


def _flags(arguments: Mapping[str, Any]) -> dict[str, Any]:
    flags: dict[str, Any] = {}
    for name, value in arguments.items():
        if len(flags) == MAX_PARSER_ARGUMENTS:
            break
        if isinstance(value, str | int | float):
            chars = len(name) + (len(value) if isinstance(value, str) else 0)
            if chars <= MAX_PARSER_ARGUMENT_CHARS:
                flags[name] = value
    return flags


def output_options(
    prompt: ChatPrompt,
    tool_choice: ToolChoice,
    *,
    parallel_tool_calls: bool = True,
    reasoning_effort: str = "",
    include_reasoning: bool = True,
    is_whole: bool = False,
) -> OutputOptions:
    """Return the output options of a chat. The caller must have checked the arguments. Raises CallError if the tools
    are too large."""
    request = parser_request(
        prompt.tools,
        tool_choice,
        parallel_tool_calls=parallel_tool_calls,
        template_kwargs=prompt.template_kwargs,
        reasoning_effort=reasoning_effort,
    )
    has_tools = bool(prompt.tools)
    return OutputOptions(
        request,
        has_tools and tool_choice != "none",
        has_tools,
        include_reasoning,
        is_whole,
        tool_calls_of(prompt.messages),
    )


def with_tools(output: OutputOptions, tools: Sequence[Mapping[str, Any]]) -> OutputOptions:
    """Return the output options of a chat whose tools have been replaced by `tools`, for example by a guard."""
    if not output.parser_request:
        return output
    fields = json.loads(output.parser_request)
    return replace(output, parser_request=json.dumps({**fields, "tools": list(tools)}, ensure_ascii=False))


class CallArguments(dict[str, Any]):
    """Arguments of a tool call in the chat's history, together with the text that the caller sent for them. Some
    renderers of vLLM copy the text into the prompt, so an equal object with different spaces would give another
    prompt."""

    _text = ""

    @classmethod
    def of(cls, value: Mapping[str, Any], text: str) -> CallArguments:
        """Create the arguments from their parsed `value` and the `text` that the caller sent."""
        arguments = cls(value)
        arguments._text = text
        return arguments


def arguments_text(arguments: Mapping[str, Any]) -> str:
    """Return the arguments of a tool call as JSON: the text that the caller sent if there is one, else the encoded
    arguments."""
    if isinstance(arguments, CallArguments):
        return arguments._text
    return json.dumps(arguments, ensure_ascii=False)


def call_arguments(path: str, text: str) -> CallArguments:
    """Return the arguments of a tool call in the chat's history as an object, since templates take an object.

    A text that is not a JSON object gives an empty object, as in vLLM: a model may have written it, and an error would
    end the conversation. Raises CallError for a text that is nested too deeply or holds too many values.
    """
    if not text:
        return CallArguments()
    try:
        value = parse(path, text)
    except NotJson:
        value = None
    return CallArguments.of(value if isinstance(value, dict) else {}, text)


def tool_calls_of(messages: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of tool calls in the assistant's messages."""
    return sum(
        len(message["tool_calls"]) for message in messages if "tool_calls" in message and message["role"] == "assistant"
    )
