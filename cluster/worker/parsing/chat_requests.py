"""Conversion of a request with parsing options (`OutputParsing.request`) into vLLM's ChatCompletionRequest, which
vLLM's parsers take. Also reads back what the parsers have changed in it, such as the grammar."""

from __future__ import annotations

import json
from typing import Any

from cluster.worker.parsing.wire import GrammarText

FIELDS = (
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "chat_template_kwargs",
    "reasoning_effort",
    "include_reasoning",
)
"""Fields of OutputParsing.request that are passed to vLLM. Other fields have no effect on vLLM's parsers."""
MAX_MESSAGE = 500
"""Greatest number of characters kept of vLLM's error messages, which can repeat the whole request."""


class WrongRequest(Exception):
    """An error for a request that vLLM's parsers refuse. `field`: the wrong field of the chat."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


def chat_request(text: str, grammar: GrammarText | None) -> Any:
    """Return vLLM's ChatCompletionRequest with the fields in `text`, a JSON object, and with the caller's grammar.

    Raises WrongRequest.
    """
    from pydantic import ValidationError
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.exceptions import VLLMError

    try:
        values = json.loads(text)
        given = {name: values[name] for name in FIELDS if values.get(name) is not None}
        if not given.get("tools"):
            given.pop("tools", None)
            if given.get("tool_choice") in ("auto", "none"):
                del given["tool_choice"]
        request = ChatCompletionRequest(messages=[{"role": "user", "content": ""}], stream=True, **given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise WrongRequest(*_located(first["loc"], first["msg"])) from error
    except VLLMError as error:
        raise WrongRequest(getattr(error, "parameter", None) or "tools", _short(error)) from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise WrongRequest("tools", _short(error)) from error
    if grammar is not None:
        request.structured_outputs = _structured_outputs(grammar)
    return request


def _located(location: tuple[int | str, ...], message: str) -> tuple[str, str]:
    """Return the field in which pydantic found an error, and a message that consists of the path inside the field and
    pydantic's message."""
    path = [str(part) for part in location]
    field = path[0] if path and path[0] in FIELDS else "tools"
    inside = ".".join(path[1:])
    return field, f"{inside}: {message}"[:MAX_MESSAGE] if inside else message[:MAX_MESSAGE]


def chat_error(error: Exception, field: str, what: str) -> WrongRequest:
    """Return the error for a chat that vLLM's code refuses, or on which vLLM's code fails.

    `field`: the wrong field, if vLLM names none. `what`: beginning of the message if vLLM's code fails without refusing
    the chat.
    """
    from vllm.exceptions import VLLMError

    text = _short(error)
    if not isinstance(error, ValueError | VLLMError):
        text = f"{what} ({type(error).__name__}: {text})"
    return WrongRequest(str(getattr(error, "parameter", None) or field), text[:MAX_MESSAGE])


def _short(error: Exception) -> str:
    return str(error.args[0] if error.args else error)[:MAX_MESSAGE]


def _structured_outputs(grammar: GrammarText) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    match grammar.kind:
        case "json_schema":
            return StructuredOutputsParams(json=grammar.value)
        case "json_object":
            return StructuredOutputsParams(json_object=True)
        case "choice":
            return StructuredOutputsParams(choice=list(grammar.values))
        case "regex":
            return StructuredOutputsParams(regex=grammar.value)
        case _:
            return StructuredOutputsParams(grammar=grammar.value)


def may_call_tools(request: Any) -> bool:
    """Return whether an answer to vLLM's request may contain tool calls."""
    return bool(request.tools) and request.tool_choice != "none"


def is_forced(request: Any) -> bool:
    """Return whether vLLM's request requires a tool call."""
    return request.tool_choice not in (None, "none", "auto")


def adjust(parser: Any, request: Any) -> None:
    """Let vLLM's parser change the request in place, if vLLM's server would do the same.

    The parser may change `skip_special_tokens` and the grammar. Raises WrongRequest.
    """
    wanted = parser.always_adjust_request or parser.reasoning_parser is not None or request.tool_choice != "none"
    if not wanted:
        return
    try:
        adjusted = parser.adjust_request(request)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, NotImplementedError) as error:
        raise WrongRequest("tools", f"no grammar can be made of them: {_short(error)}") from error
    if adjusted is not request:
        raise WrongRequest("tools", "this parser replaces the request, which is not supported")
    if is_forced(request) and _reads_no_forced_call(parser):
        raise WrongRequest(
            "tool_choice", "this model's parser (mistral) does not read a forced call as a call: use tool_choice auto"
        )


def _reads_no_forced_call(parser: Any) -> bool:
    """Return whether this parser would treat a forced tool call as content.

    This happens with a Mistral tokenizer of version 11 or newer in transformers' form. vLLM 0.32 then forces the output
    to be a bare JSON array, but its parser reads such an array as a tool call only with older tokenizers.
    """
    inner = getattr(getattr(parser, "_tool_parser", None), "_parser_engine", parser)
    return getattr(inner, "_is_pre_v11", None) is False


def changed_grammar(request: Any, before: Any) -> GrammarText | None:
    """Return the grammar of a request after vLLM's parser has adjusted the request; None if the adjustment has not
    changed the grammar.

    `before`: the request's StructuredOutputsParams before the adjustment.
    """
    after = request.extract_structured_outputs()
    if after is None or after is before or after == before:
        return None
    if after.structural_tag is not None:
        return GrammarText("structural_tag", after.structural_tag)
    if after.json is not None:
        return GrammarText("json_schema", after.json if isinstance(after.json, str) else json.dumps(after.json))
    if after.json_object:
        return GrammarText("json_object")
    if after.grammar is not None:
        return GrammarText("grammar", after.grammar)
    if after.regex is not None:
        return GrammarText("regex", after.regex)
    return GrammarText("choice", values=tuple(after.choice or ()))


def reasoning_ended(parser: Any, request: Any, prompt: list[int]) -> bool | None:
    """Return whether the reasoning has ended before the output begins. If so, a grammar applies from the first token.

    The result equals that of vLLM's server. It is True if the caller wants no reasoning or the grammar covers the
    reasoning, and None if there is no reasoning parser.
    """
    if not request.include_reasoning or request._grammar_from_parser:
        return True
    return None if parser.reasoning_parser is None else bool(parser.is_reasoning_end(prompt))


def template_kwargs(request: Any) -> dict[str, Any]:
    """Return the arguments of the chat template, as vLLM's server makes them. They also control some parsers."""
    chat = request.build_chat_params(None, "auto").with_defaults({})
    return dict(chat.chat_template_kwargs)
