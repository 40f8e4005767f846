"""Conversion of the messages of a chat into the form that the model's template takes.

Source: vLLM 0.32's server (`renderers/chat_utils.py`, `renderers/hf.py`). transformers passes messages to the template
unchanged. vLLM's server changes them: it converts contents to the form that the template takes, passes a missing
content as an empty one, passes tool results as text, and turns developer messages into one system message if the
template does not know the role `developer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

BILLING_HEADER: Final = "x-anthropic-billing-header"
"""Beginning of a line that a coding agent puts before its system prompt. The line differs in every request. vLLM drops
the line, so that prompts share their prefix in the cache."""

Message = Mapping[str, Any]


def conversation(messages: Sequence[Message], *, in_parts: bool, knows_developer: bool) -> list[Message]:
    """Return the messages for a template. Messages that need no change are returned as they are.

    `in_parts`: whether the template takes contents as lists of parts (content_format.py). `knows_developer`: whether
    the template has the role `developer`.
    """
    out = [_converted(message, in_parts) for message in messages]
    if not any(message.get("role") == "developer" for message in out):
        return out
    if knows_developer:
        return [{**message, "tools": None} if message.get("role") == "developer" else message for message in out]
    return _with_one_system([_as_system(message) for message in out])


def merged_system(messages: Sequence[Message]) -> list[Message]:
    """Return messages of Anthropic's API with all system messages merged into one at the beginning. vLLM's server does
    this for a template that allows a system message only at the beginning. The texts are joined without separator."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    others = (message for message in messages if message["role"] != "system")
    return [{"role": "system", "content": "".join(system)}, *others]


def _converted(message: Message, in_parts: bool) -> Message:
    role, content = message.get("role"), message.get("content")
    has_header = role == "system" and isinstance(content, str) and content.startswith(BILLING_HEADER)
    if isinstance(content, str) and (role == "tool" or not in_parts) and not has_header:
        return message
    parts = _parts(content)
    if role == "system":
        parts = [kept for part in parts if (kept := _without_header(part)) is not None]
    if in_parts and role != "tool":
        return {**message, "content": parts}
    texts = [part["text"] for part in parts]
    return {**message, "content": "\n".join(texts if in_parts else filter(None, texts))}  # as vLLM does


def _parts(content: object) -> list[Mapping[str, Any]]:
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)  # type: ignore[call-overload]


def _without_header(part: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return a part of a system message without the billing header, a line that a coding agent puts before its system
    prompt. Returns None if the part holds nothing else."""
    text = part["text"]
    if not text.startswith(BILLING_HEADER):
        return part
    rest = text.partition("\n")[2]
    return {**part, "text": rest} if rest else None


def _as_system(message: Message) -> Message:
    return {**message, "role": "system"} if message.get("role") == "developer" else message


def _with_one_system(messages: Sequence[Message]) -> list[Message]:
    """Merge all system messages into one at the beginning. Many templates allow no system message elsewhere."""
    system = [message for message in messages if message.get("role") == "system"]
    if len(system) == 1 and messages[0] is system[0]:
        return list(messages)
    texts = ["\n".join(part["text"] for part in _parts(message["content"])) for message in system]
    merged = {"role": "system", "content": "\n\n".join(filter(None, texts))}
    return [merged, *(message for message in messages if message.get("role") != "system")]
