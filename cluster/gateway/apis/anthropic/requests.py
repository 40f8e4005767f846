"""Parsing of bodies of Anthropic's Messages API into generation requests.

Messages are translated to messages of OpenAI's API, as vLLM 0.32 does it (`entrypoints/anthropic/serving.py`), so that
a chat template renders the same prompt for both APIs: a `tool_result` becomes a message of the role tool, a `tool_use`
becomes a tool call of the assistant, and `thinking` becomes the assistant's reasoning. A known field or block is
refused if it would change the answer and is not supported; the error names the field. Hints and unknown fields are
ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from cluster.api.outcomes import CallError, invalid, quoted
from cluster.api.types import Grammar
from cluster.gateway.apis.anthropic.content import chat_messages, text_of, without_header
from cluster.gateway.apis.anthropic.errors import with_messages_names
from cluster.gateway.apis.openai.fields import Fields, unsupported
from cluster.gateway.apis.openai.requests import MAX_SALT_CHARS, ParsedRequest
from cluster.gateway.calls import tools as chat_tools
from cluster.gateway.calls.request import (
    MAX_MESSAGES,
    MAX_STOP_STRINGS,
    ChatPrompt,
    GenerationRequest,
    OutputOptions,
    RequestOptions,
)

MIN_BUDGET_TOKENS: Final = 1024
"""Least budget for thinking, in tokens, that Anthropic's API accepts."""
EFFORTS: Final = ("low", "medium", "high", "xhigh", "max")
COUNT_FIELDS: Final = frozenset(
    {"chat_template_kwargs", "messages", "model", "output_config", "system", "thinking", "tool_choice", "tools"}
)
"""The fields that are read from a body of /v1/messages/count_tokens; all other fields are ignored."""
# Known fields that would change the answer and are not supported, each with the values at which it has no effect.
_UNSERVED: Final[Mapping[str, tuple[Any, ...]]] = {
    "ec_transfer_params": (),
    "inference_geo": ("global",),  # where data may be processed: not a hint that may be ignored
    "kv_transfer_params": (),
    "mcp_servers": ([],),
    "output_format": (),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}
MESSAGES_FIELDS: Final = (
    COUNT_FIELDS
    | _UNSERVED.keys()
    | {"cache_salt", "container", "max_tokens", "metadata", "stop_sequences", "stream", "temperature", "top_k", "top_p"}
)
"""The fields that are read from a body of /v1/messages; all other fields are ignored."""
NAMES: Final[Mapping[str, str]] = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "max_reasoning_tokens": "thinking.budget_tokens",
    "chat_template_kwargs_json": "chat_template_kwargs",
}
"""Names of fields in the caller's body, keyed by the names of these fields in a generation request."""


def parse_messages(body: Fields) -> ParsedRequest:
    """Parse a body of /v1/messages. Raises CallError."""
    _refuse_unserved(body)
    stream = body.flag("stream")
    prompt, output = _chat(body, is_whole=not stream)
    request = GenerationRequest(_model(body), prompt, _options(body), cache_salt=_salt(body), output=output)
    _check_metadata(body)
    return ParsedRequest([request], stream, names=NAMES)


def _refuse_unserved(body: Fields) -> None:
    for name in sorted(body.values.keys() & _UNSERVED.keys()):
        value = body.values[name]
        if value is not None and value not in _UNSERVED[name]:
            raise unsupported(name, "use output_config.format" if name == "output_format" else "leave it out")
    # A container matters to tools of Anthropic's servers only, except for the skills that it brings.
    container = body.values.get("container")
    if isinstance(container, dict) and container.get("skills"):
        raise unsupported("container.skills")


def parse_count(body: Fields) -> ParsedRequest:
    """Parse a body of /v1/messages/count_tokens. The prompt is the one that a /v1/messages request with the same body
    would have. Raises CallError."""
    prompt, _ = _chat(body, is_whole=True)
    return ParsedRequest([GenerationRequest(_model(body), prompt, RequestOptions())], names=NAMES)


def _model(body: Fields) -> str:
    model = body.text("model")
    if not model:
        raise invalid("model", "is missing")
    return model


def _salt(body: Fields) -> str:
    salt = body.text("cache_salt")
    if salt == "" or (salt is not None and len(salt) > MAX_SALT_CHARS):
        raise invalid("cache_salt", f"must have 1 to {MAX_SALT_CHARS} characters")
    return salt or ""


def _check_metadata(body: Fields) -> None:
    metadata = body.object("metadata")
    if metadata is not None:
        metadata.text("user_id")


# ---- the prompt


def _chat(body: Fields, *, is_whole: bool) -> tuple[ChatPrompt, OutputOptions]:
    """Return the prompt, and the options for the parsing of the output. `is_whole`: True if the caller gets the answer
    as a whole, False for a stream."""
    messages = _messages(body)
    tools = _tools(body)
    choice, parallel = _tool_choice(body, tools)
    effort = _effort(body)
    arguments = body.object("chat_template_kwargs")
    given = {**(arguments.values if arguments is not None else {}), **_thinking_arguments(body)}
    last = messages[-1]  # an answer continues the text of a final message of the assistant
    resumes = last["role"] == "assistant" and bool(last["content"]) and "tool_calls" not in last
    prompt = ChatPrompt(
        messages,
        chat_tools.template_arguments(given, effort),
        continue_final_message=resumes,
        add_generation_prompt=not resumes,
        tools=tools,
        merges_system=True,
    )
    output = chat_tools.output_options(
        prompt, choice, parallel_tool_calls=parallel, reasoning_effort=effort, is_whole=is_whole
    )
    return prompt, output


def _messages(body: Fields) -> list[dict[str, Any]]:
    system = _system(body)
    body.at_most(MAX_MESSAGES, "messages", "messages")
    if not body.array("messages"):
        raise invalid("messages", "must not be empty: give at least one message")
    messages = chat_messages(body)
    if not messages:
        raise invalid("messages", "must have content: give at least one text")
    return [*([{"role": "system", "content": system}] if system else []), *messages]


def _system(body: Fields) -> str:
    value = body.values.get("system")
    if value is None or isinstance(value, str):
        return without_header(value or "")
    return text_of(body, "system")


# ---- tools


def _tools(body: Fields) -> list[dict[str, Any]]:
    body.at_most(chat_tools.MAX_TOOLS, "tools", "tools")
    tools = [_tool(tool) for tool in body.objects("tools")]
    try:
        chat_tools.check_tools("tools", tools, inner="")
    except CallError as error:
        raise with_messages_names(error, {}) from None
    return tools


def _tool(tool: Fields) -> dict[str, Any]:
    type_ = tool.text("type") or "custom"
    if type_ != "custom":
        remedy = f"{quoted(type_)} is a tool of Anthropic's servers: give a tool with input_schema"
        raise unsupported(tool.path("type"), remedy)
    if tool.values.get("name") is None:
        raise invalid(tool.path("name"), "is missing")
    schema = tool.object("input_schema")
    if schema is None:
        raise invalid(tool.path("input_schema"), "is missing")
    parameters = schema.values if "type" in schema.values else {**schema.values, "type": "object"}
    return chat_tools.function_tool(
        tool.values["name"], tool.values.get("description"), parameters, tool.values.get("strict")
    )


def _tool_choice(body: Fields, tools: Sequence[Mapping[str, Any]]) -> tuple[chat_tools.ToolChoice, bool]:
    """Return the tool choice in OpenAI's form, and whether an answer may have several tool calls."""
    given = body.object("tool_choice")
    if given is None:
        return ("auto" if tools else "none"), True
    parallel = not given.flag("disable_parallel_tool_use")
    choice: chat_tools.ToolChoice
    match given.text("type"):
        case "auto":
            return ("auto" if tools else "none"), parallel
        case "none":
            return "none", parallel
        case "any":
            choice, field = "required", "tool_choice"
        case "tool":
            field = given.path("name")
            if not (name := given.text("name")):
                raise invalid(field, "is missing: give the name of a tool")
            choice = chat_tools.named_choice(name)
        case other:
            raise invalid(given.path("type"), f"must be auto, any, tool or none; got {quoted(other)}")
    chat_tools.check_choice(tools, choice, field)
    return choice, parallel


# ---- thinking and options


def _thinking_arguments(body: Fields) -> dict[str, Any]:
    """Return the template arguments for the field `thinking`."""
    thinking = body.object("thinking")
    if thinking is None:
        return {}
    match thinking.text("type"):
        case "enabled":
            return {"enable_thinking": True}
        case "disabled":
            return {"enable_thinking": False}
        case "adaptive":
            return {}
        case other:
            raise invalid(thinking.path("type"), f"must be enabled, disabled or adaptive; got {quoted(other)}")


def _budget(body: Fields, max_tokens: int) -> int | None:
    thinking = body.object("thinking")
    if thinking is None or thinking.text("type") != "enabled":
        return None
    budget, field = thinking.integer("budget_tokens"), thinking.path("budget_tokens")
    if budget is None:
        raise invalid(field, "is missing")
    if not MIN_BUDGET_TOKENS <= budget < max_tokens:
        raise invalid(field, f"must be at least {MIN_BUDGET_TOKENS} and below max_tokens ({max_tokens}), got {budget}")
    return budget


def _effort(body: Fields) -> str:
    config = body.object("output_config")
    effort = None if config is None else config.text("effort")
    if effort is not None and effort not in EFFORTS:
        raise invalid("output_config.effort", f"must be one of {', '.join(EFFORTS)}; got {quoted(effort)}")
    return effort or ""


def _grammar(body: Fields) -> Grammar | None:
    config = body.object("output_config")
    form = None if config is None else config.object("format")
    if form is None:
        return None
    if form.text("type") != "json_schema":
        raise invalid(form.path("type"), f"must be json_schema, got {quoted(form.text('type'))}")
    schema = form.object("schema")
    if schema is None:
        raise invalid(form.path("schema"), "is missing")
    try:
        return Grammar("json_schema", json.dumps(schema.values, allow_nan=False))
    except ValueError as error:
        raise invalid(schema.at, f"is not a JSON schema: {error}") from None


def _options(body: Fields) -> RequestOptions:
    max_tokens = body.integer("max_tokens")
    if max_tokens is None:
        raise invalid("max_tokens", "is missing: give the largest number of tokens of the answer")
    temperature = body.number("temperature")
    if temperature is not None and not 0 <= temperature <= 1:
        raise invalid("temperature", f"must be from 0 to 1, got {temperature:g}")
    return RequestOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=body.number("top_p"),
        top_k=body.integer("top_k"),
        stop=body.strings("stop_sequences", MAX_STOP_STRINGS),
        grammar=_grammar(body),
        max_reasoning_tokens=_budget(body, max_tokens),
    )


PARSERS: Final[Mapping[str, Callable[[Fields], ParsedRequest]]] = {
    "messages": parse_messages,
    "count_tokens": parse_count,
}
"""The parsers, keyed by the name that is passed to Bodies.http."""
