"""Convert plain Python values to request messages.

An invalid value raises ValueError or TypeError. The error message names the field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, cast

from cluster.v1 import inference_pb2 as pb

Messages = str | Sequence[Mapping[str, Any] | pb.Message]


class SamplingParams(TypedDict, total=False):
    """Parameters of chat and completion requests, named as in the API.

    If a parameter is absent, the model's default is used.
    """

    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    n: int
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    logprobs: bool
    top_logprobs: int
    ignore_eos: bool
    user: str
    response_format: Mapping[str, Any] | pb.ResponseFormat
    priority: str
    affinity_key: str
    metadata: Mapping[str, str]
    resumable: bool


class ChatParams(SamplingParams, total=False):
    """Parameters of chat requests."""

    tools: Sequence[Mapping[str, Any] | pb.Tool]
    tool_choice: str | Mapping[str, Any] | pb.ToolChoice
    parallel_tool_calls: bool
    reasoning_effort: str
    max_reasoning_tokens: int
    chat_template_kwargs: Mapping[str, Any]
    continue_final_message: bool


def chat_request(model: str, messages: Messages, params: ChatParams) -> pb.ChatRequest:
    """Build a ChatRequest. If `messages` is a string, the string becomes one message with the role user."""
    fields = _common(params, ChatParams)
    if "tools" in fields:
        fields["tools"] = [_tool(tool, i) for i, tool in enumerate(fields["tools"])]
    if "tool_choice" in fields:
        fields["tool_choice"] = _tool_choice(fields["tool_choice"])
    if "chat_template_kwargs" in fields:
        fields["chat_template_kwargs_json"] = json.dumps(fields.pop("chat_template_kwargs"))
    return pb.ChatRequest(model=model, messages=to_messages(messages), **fields)


def complete_request(model: str, prompt: str | Sequence[int], params: SamplingParams) -> pb.CompleteRequest:
    """Build a CompleteRequest. The prompt is either a text or a sequence of token ids."""
    fields = _common(params, SamplingParams)
    if isinstance(prompt, str):
        return pb.CompleteRequest(model=model, prompt=prompt, **fields)
    return pb.CompleteRequest(model=model, prompt_token_ids=prompt, **fields)


def tokenize_request(
    model: str, text: str | Messages, tools: Sequence[Mapping[str, Any] | pb.Tool]
) -> pb.TokenizeRequest:
    """Build a TokenizeRequest. `tools`: the tools with which the chat template renders messages."""
    request = pb.TokenizeRequest(model=model, tools=[_tool(tool, i) for i, tool in enumerate(tools)])
    if isinstance(text, str):
        request.text = text
    else:
        request.messages.extend(to_messages(text))
    return request


def to_messages(messages: Messages) -> list[pb.Message]:
    """Convert a string, OpenAI dictionaries or Message objects to API messages."""
    if isinstance(messages, str):
        return [pb.Message(role="user", content=messages)]
    return [m if isinstance(m, pb.Message) else _message(m, f"messages[{i}]") for i, m in enumerate(messages)]


def _common(params: Mapping[str, Any], kind: type) -> dict[str, Any]:
    known = kind.__annotations__.keys() | SamplingParams.__annotations__.keys()
    for name in params:
        if name not in known:
            raise TypeError(f"unknown parameter {name!r}; known are {', '.join(sorted(known))}")
    fields = {name: value for name, value in params.items() if value is not None}
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    if "response_format" in fields:
        fields["response_format"] = _response_format(fields["response_format"])
    return fields


def _known_fields(data: Mapping[str, Any], where: str, *keys: str) -> dict[str, Any]:
    """Return the entries of `data` with a value other than None.

    Raises ValueError for a key that is not in `keys`. `where`: path of `data` in the request, for the error message.
    """
    for key in data:
        if key not in keys:
            raise ValueError(f"{where}.{key}: unknown key; known are {', '.join(keys)}")
    return {key: data[key] for key in keys if data.get(key) is not None}


def _message(data: Mapping[str, Any], where: str) -> pb.Message:
    keys = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
    fields = _known_fields(data, where, *keys)
    if "role" not in fields:
        raise ValueError(f"{where}.role: missing; it is system, user, assistant or tool")
    if not isinstance(fields.get("content", ""), str):
        fields["parts"] = [_part(part, f"{where}.content[{i}]") for i, part in enumerate(fields.pop("content"))]
    if "tool_calls" in fields:
        fields["tool_calls"] = [
            pb.ToolCall(index=i, id=call.get("id", ""), **_known_fields(call["function"], where, "name", "arguments"))
            for i, call in enumerate(fields["tool_calls"])
        ]
    return pb.Message(**fields)


def _part(data: Mapping[str, Any], where: str) -> pb.ContentPart:
    kind = data.get("type")
    if kind == "text":
        return pb.ContentPart(text=data["text"])
    if kind == "image_url":
        image = data["image_url"]
        image = {"url": image} if isinstance(image, str) else image
        return pb.ContentPart(image=pb.Image(**_known_fields(image, where, "url", "detail")))
    raise ValueError(f"{where}.type: {kind!r} is neither text nor image_url")


def _tool(tool: Mapping[str, Any] | pb.Tool, i: int) -> pb.Tool:
    if isinstance(tool, pb.Tool):
        return tool
    fields = _known_fields(tool.get("function", tool), f"tools[{i}]", "name", "description", "parameters", "strict")
    if "parameters" in fields:
        fields["parameters_json"] = json.dumps(fields.pop("parameters"))
    return pb.Tool(**fields)


def _tool_choice(choice: str | Mapping[str, Any] | pb.ToolChoice) -> pb.ToolChoice:
    if isinstance(choice, pb.ToolChoice):
        return choice
    if isinstance(choice, str):
        return pb.ToolChoice(mode=choice)
    return pb.ToolChoice(mode="function", name=choice["function"]["name"])


def _response_format(value: Mapping[str, Any] | pb.ResponseFormat) -> pb.ResponseFormat:
    if isinstance(value, pb.ResponseFormat):
        return value
    fields = _known_fields(value, "response_format", "type", "json_schema", "regex", "choice", "grammar")
    schema = cast("str | Mapping[str, Any] | None", fields.get("json_schema"))
    if isinstance(schema, Mapping):
        # OpenAI's form wraps the schema in {"name": ..., "schema": ...}
        inner = schema["schema"] if "schema" in schema and "name" in schema else schema
        fields["json_schema"] = json.dumps(inner)
    return pb.ResponseFormat(**fields)
