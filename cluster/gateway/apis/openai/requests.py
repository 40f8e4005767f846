"""Parsing of OpenAI request bodies, with vLLM's extensions, into generation requests.

A known field is refused if it would change the answer and is not supported; the error names the field. Hints and
unknown fields are ignored, as OpenAI's servers do. The names and shapes of fields are those of vLLM 0.32
(`entrypoints/openai/*/protocol.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from cluster.api.outcomes import CallError, Outcome, Violation, invalid, quoted
from cluster.api.types import Grammar
from cluster.gateway.apis.json_values import kind, parse
from cluster.gateway.apis.openai.fields import INT64, Fields, real, unsupported, whole_numbers
from cluster.gateway.apis.openai.messages import messages_of
from cluster.gateway.apis.openai.tools import choice_of, documents_of, tools_of
from cluster.gateway.calls.request import (
    DEFAULT_COMPLETE_TOKENS,
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_METADATA,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    ChatPrompt,
    GenerationRequest,
    IdsPrompt,
    Prompt,
    RequestOptions,
    TextPrompt,
)
from cluster.gateway.calls.tools import check_effort, output_options, template_arguments

MAX_PROMPTS = 128
MAX_SALT_CHARS = 512
_TOKEN_ID = re.compile(r"-?[0-9]{1,10}")

# Known fields that would change the answer and are not supported. Each field is listed with the values at which it has
# no effect; a field with any other value is refused.
_UNSERVED: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "ec_transfer_params": (),
    "echo": (False,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "logprob_token_ids": ([],),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}
_UNSERVED_CHAT: dict[str, tuple[Any, ...]] = _UNSERVED | {
    "add_special_tokens": (False,),
    "audio": (),
    "chat_template": (),
    "function_call": ("none",),
    "functions": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "return_prompt_text": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_UNSERVED_COMPLETION: dict[str, tuple[Any, ...]] = _UNSERVED | {
    "add_special_tokens": (True,),
    "prompt_embeds": ([],),
    "suffix": ("",),
    "thinking_token_budget": (-1,),
}
_FIELDS = frozenset(
    {
        *("best_of", "cache_salt", "frequency_penalty", "ignore_eos", "logit_bias", "logprobs", "max_tokens"),
        *("metadata", "min_p", "min_tokens", "model", "n", "presence_penalty", "priority", "prompt"),
        *("repetition_penalty",),
        *("response_format", "seed", "stop", "stop_token_ids", "stream", "stream_options", "structured_outputs"),
        *("temperature", "top_k", "top_p"),
    }
)
COMPLETION_FIELDS = _FIELDS | _UNSERVED_COMPLETION.keys()
"""The fields that are read from a body of /v1/completions; all other fields are ignored."""
CHAT_FIELDS = (
    (_FIELDS - {"best_of", "prompt"})
    | _UNSERVED_CHAT.keys()
    | {"add_generation_prompt", "chat_template_kwargs", "continue_final_message", "max_completion_tokens", "messages"}
    | {"documents", "include_reasoning", "parallel_tool_calls", "reasoning_effort", "thinking_token_budget"}
    | {"tool_choice", "tools", "top_logprobs"}
)
_CHAT_NAMES = {
    "chat_template_kwargs_json": "chat_template_kwargs",
    "logprobs": "top_logprobs",
    "max_reasoning_tokens": "thinking_token_budget",
}
_INSTEAD = {name: "use structured_outputs" for name in _UNSERVED if name.startswith("guided_")}


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A parsed body: one generation request for each prompt, and the options of the answer.

    `names` maps the name of a field in a generation request to the name of that field in the caller's body.
    """

    requests: Sequence[GenerationRequest]
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    names: Mapping[str, str] = field(default_factory=dict)


def with_caller_names(error: CallError, names: Mapping[str, str], prompt: int | None = None) -> CallError:
    """Return the error with its request fields renamed to the names in the caller's body. `names`: maps field names of
    a generation request to names in the body. `prompt`: index of the prompt that caused the error, if the request has
    several."""
    if not error.violations:
        return error
    renamed = [Violation(_renamed(v.field, names, prompt), v.description) for v in error.violations]
    message = error.message
    if error.outcome in (Outcome.INVALID_FIELD, Outcome.UNSUPPORTED_FEATURE):
        for old, new in zip(error.violations, renamed, strict=True):
            message = message.replace(f"{old.field}:", f"{new.field}:", 1)
    return CallError(error.outcome, message, violations=renamed, retry_after_s=error.retry_after_s)


def _renamed(field: str, names: Mapping[str, str], prompt: int | None) -> str:
    name, bracket, rest = field.partition("[")
    name = names.get(name, name)
    if prompt is not None and name == "prompt":
        name = f"prompt[{prompt}]"
    return name + bracket + rest


def parse_chat(body: Fields) -> ParsedRequest:
    """Parse a body of /v1/chat/completions. Raises CallError."""
    refuse_unserved(body, _UNSERVED_CHAT)
    messages = messages_of(body)
    kwargs, effort = body.object("chat_template_kwargs"), body.text("reasoning_effort") or ""
    check_effort(effort)
    resumes = body.flag("continue_final_message")
    generates = body.flag("add_generation_prompt", not resumes)
    if resumes and generates:
        raise invalid("add_generation_prompt", "must be false with continue_final_message")
    tools = tools_of(body)
    choice = choice_of(body, tools)
    arguments = template_arguments(kwargs.values if kwargs is not None else {}, effort)
    prompt = ChatPrompt(messages, arguments, resumes, generates, tools, documents_of(body))
    output = output_options(
        prompt,
        choice,
        parallel_tool_calls=body.flag("parallel_tool_calls", True),
        reasoning_effort=effort,
        include_reasoning=body.flag("include_reasoning", True),
        is_whole=not body.flag("stream"),
    )
    length = "max_tokens" if body.values.get("max_completion_tokens") is None else "max_completion_tokens"
    options = _options(body, length, *_chat_logprobs(body), body.integer("thinking_token_budget"))
    if not isinstance(choice, str) and body.values.get("structured_outputs") is not None:
        raise invalid("structured_outputs", "cannot be combined with a named tool_choice: give one of them")
    request = GenerationRequest(
        body.text("model") or "",
        prompt,
        options,
        cache_salt=salt_of(body),
        metadata=metadata_of(body),
        output=output,
        priority_class=priority_of(body),
    )
    return _parsed(body, [request], _CHAT_NAMES | {"max_tokens": length})


def parse_completion(body: Fields) -> ParsedRequest:
    """Parse a body of /v1/completions. Raises CallError."""
    refuse_unserved(body, _UNSERVED_COMPLETION)
    best_of = body.integer("best_of")
    if best_of is not None and best_of != (body.integer("n") or 1):
        raise unsupported("best_of", "ask for n choices and pick one")
    logprobs = body.integer("logprobs")
    # OpenAI returns the sampled token in addition to the k most likely tokens: one token more than `logprobs` says.
    options = _options(body, "max_tokens", logprobs, None if logprobs is None else logprobs + 1)
    model, salt, metadata = body.text("model") or "", salt_of(body), metadata_of(body)
    first = GenerationRequest(
        model, TextPrompt(""), options, DEFAULT_COMPLETE_TOKENS, salt, metadata, priority_class=priority_of(body)
    )
    requests = [replace(first, prompt=prompt) for prompt in _prompts(body)]
    return _parsed(body, requests, {"prompt_token_ids": "prompt"})


def _parsed(body: Fields, requests: Sequence[GenerationRequest], names: Mapping[str, str]) -> ParsedRequest:
    stream = body.flag("stream")
    options = body.object("stream_options")
    if options is not None and not stream:
        raise invalid("stream_options", "needs stream to be true")
    usage = options is not None and options.flag("include_usage")
    continuous = options is not None and options.flag("continuous_usage_stats")
    return ParsedRequest(requests, stream, usage, usage and continuous, names)


def metadata_of(body: Fields) -> dict[str, str]:
    """Return the metadata of a request. Raises CallError."""
    entries = body.object("metadata")
    if entries is None:
        return {}
    entries.at_most(MAX_METADATA, "entries")
    return {name: entries.text(name) or "" for name in entries.values}


def priority_of(body: Fields) -> str:
    """Return the priority class that a request names, or "" if it names none. "" stands for the class in the tenant's
    policy. The number 0, vLLM's default, also gives ""."""
    value = body.values.get("priority")
    if isinstance(value, int) and value != 0:
        raise unsupported("priority", "give the name of a priority class, or leave it out")
    return "" if value == 0 else body.text("priority") or ""


def salt_of(body: Fields) -> str:
    """Return the salt of the prefix cache; "" without one. Raises CallError."""
    salt = body.text("cache_salt")
    if salt == "" or (salt is not None and len(salt) > MAX_SALT_CHARS):
        raise invalid("cache_salt", f"must have 1 to {MAX_SALT_CHARS} characters")
    return salt or ""


def refuse_unserved(body: Fields, unserved: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise CallError if the body has a field of `unserved` with a value that would change the answer. `unserved`: the
    fields that are not supported, each with the values that change nothing and are therefore allowed."""
    for name in sorted(body.values.keys() & unserved.keys()):
        value = body.values[name]
        if value is not None and not any(value == other and type(value) is type(other) for other in unserved[name]):
            raise unsupported(name, _INSTEAD.get(name, "leave it out"))


# ---- prompts


def _prompts(body: Fields) -> list[Prompt]:
    """Return the prompts in the field `prompt`: a string, an array of strings, an array of token ids, or an array of
    arrays of token ids."""
    value = body.values.get("prompt")
    if hasattr(value, "dtype"):  # an array from a helper process; numpy is not imported here, to keep the start fast
        return [IdsPrompt(cast("Sequence[int]", value))]
    if isinstance(value, str) and value:
        return [TextPrompt(value)]
    if value is None or value in ("", []):
        raise invalid("prompt", "must not be empty: give a string, token ids, or an array of either")
    if not isinstance(value, list):
        raise body.wrong("prompt", "a string or an array")
    if not isinstance(value[0], str | list):
        return [IdsPrompt(whole_numbers("prompt", value))]
    if len(value) > MAX_PROMPTS:
        raise invalid("prompt", f"at most {MAX_PROMPTS} prompts in one request, got {len(value)}")
    return [_array_prompt(f"prompt[{i}]", item) for i, item in enumerate(value)]


def _array_prompt(path: str, value: object) -> Prompt:
    match value:
        case str() | list() if not value:
            raise invalid(path, "must not be empty")
        case str():
            return TextPrompt(value)
        case list():
            return IdsPrompt(whole_numbers(path, value))
        case _:
            raise invalid(path, f"must be a string or an array of token ids, got {kind(value)}")


# ---- options


def _options(
    body: Fields, length: str, logprobs: int | None, logprobs_told: int | None, budget: int | None = None
) -> RequestOptions:
    n = body.integer("n")
    return RequestOptions(
        max_tokens=body.integer(length),
        min_tokens=body.integer("min_tokens"),
        temperature=body.number("temperature"),
        top_p=body.number("top_p"),
        top_k=body.integer("top_k"),
        min_p=body.number("min_p"),
        seed=body.integer("seed", INT64),
        stop=body.strings("stop", MAX_STOP_STRINGS),
        stop_token_ids=body.integers("stop_token_ids", MAX_STOP_TOKEN_IDS),
        n=1 if n is None else n,
        frequency_penalty=body.number("frequency_penalty"),
        presence_penalty=body.number("presence_penalty"),
        repetition_penalty=body.number("repetition_penalty"),
        logit_bias=_logit_bias(body),
        logprobs=logprobs,
        logprobs_returned=logprobs_told,
        ignore_eos=body.flag("ignore_eos"),
        grammar=_grammar(body),
        max_reasoning_tokens=None if budget == -1 else budget,
    )


def _chat_logprobs(body: Fields) -> tuple[int | None, int | None]:
    top = body.integer("top_logprobs")
    if body.flag("logprobs"):
        return top or 0, None
    if top:
        raise invalid("top_logprobs", "needs logprobs to be true")
    return None, None


def _logit_bias(body: Fields) -> dict[int, float]:
    entries = body.object("logit_bias")
    if entries is None:
        return {}
    entries.at_most(MAX_LOGIT_BIAS, "entries")
    biases = {}
    for key, value in entries.values.items():
        path = f"logit_bias[{key}]"
        if not _TOKEN_ID.fullmatch(key):
            raise invalid(path, "must be a token id, a whole number")
        biases[int(key)] = real(path, value)
    return biases


def _grammar(body: Fields) -> Grammar | None:
    form, outputs = body.object("response_format"), body.object("structured_outputs")
    grammar = _response_format(form) if form is not None else None
    if outputs is None:
        return grammar
    if grammar is not None:
        raise invalid("structured_outputs", "give either response_format or structured_outputs, not both")
    return _structured_outputs(outputs)


def _response_format(form: Fields) -> Grammar | None:
    match form.text("type"):
        case "text":
            return None
        case "json_object":
            return Grammar("json_object", "")
        case "json_schema":
            described = form.object("json_schema")
            schema = described.object("schema") if described is not None else None
            if described is None or schema is None:
                raise invalid(form.path("json_schema.schema"), "is missing")
            return Grammar("json_schema", _schema(schema.at, schema.values))
        case "structural_tag":
            raise unsupported(form.path("type"), "use json_schema or structured_outputs")
        case other:
            raise invalid(form.path("type"), f"must be text, json_object or json_schema, got {quoted(other)}")


def _structured_outputs(outputs: Fields) -> Grammar | None:
    for name in ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern", "structural_tag"):
        if outputs.values.get(name) not in (None, False):
            raise unsupported(outputs.path(name))
    readers: dict[str, Callable[[], Grammar | None]] = {
        "json": lambda: Grammar("json_schema", _schema(outputs.path("json"), outputs.values["json"])),
        "regex": lambda: Grammar("regex", outputs.text("regex") or ""),
        "choice": lambda: Grammar("choice", outputs.strings("choice", MAX_CHOICES)),
        "grammar": lambda: Grammar("grammar", outputs.text("grammar") or ""),
        "json_object": lambda: Grammar("json_object", "") if outputs.flag("json_object") else None,
    }
    given = [name for name in readers if outputs.values.get(name) is not None]
    if len(given) != 1:
        raise invalid(outputs.at, f"needs exactly one of {', '.join(readers)}; got {', '.join(given) or 'none'}")
    return readers[given[0]]()


def _schema(path: str, value: object) -> str:
    """Return a JSON schema as JSON text. `value`: an object or a JSON text, as in vLLM's server."""
    if isinstance(value, str):
        value = parse(path, value)
    if not isinstance(value, dict):
        raise invalid(path, f"must be a JSON object, got {kind(value)}")
    try:
        return json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise invalid(path, f"is not a JSON schema: {error}") from None
