"""Extraction and replacement of the texts in a prompt that guards must search, because they reach the model.

In a chat prompt these are all texts that a caller writes: the contents, names, reasoning and tool calls of messages,
the tools, the documents, and the values of template arguments. The keys in tool call arguments are also such texts.
Each text is searched by itself: a template inserts other text between two texts, so no match can span two texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.api.outcomes import invalid
from cluster.gateway.calls.request import ChatPrompt, TextPrompt

_FIXED_KEYS = frozenset({"role", "type"})
"""Message keys that hold fixed words instead of free text. Their values are validated, and templates compare them with
fixed words."""


def texts_of(prompt: ChatPrompt | TextPrompt) -> list[str]:
    """Return the texts of a prompt, in order. Raises CallError if the prompt is nested too deeply."""
    texts: list[str] = []

    def collect(text: str) -> str:
        texts.append(text)
        return text

    _rewritten(prompt, collect)
    return texts


def with_texts(prompt: ChatPrompt | TextPrompt, texts: Sequence[str]) -> ChatPrompt | TextPrompt:
    """Return a copy of the prompt with its texts replaced. `texts`: the replacements, in the order of `texts_of`."""
    rest = iter(texts)
    return _rewritten(prompt, lambda text: next(rest))


def messages_of(prompt: object) -> int:
    """Return the number of messages in a prompt; 1 for a prompt that is not a chat prompt."""
    return len(prompt.messages) if isinstance(prompt, ChatPrompt) else 1


def _rewritten(prompt: ChatPrompt | TextPrompt, write: Callable[[str], str]) -> ChatPrompt | TextPrompt:
    if isinstance(prompt, TextPrompt):
        return TextPrompt(write(prompt.text))
    try:
        messages = [
            {key: value if key in _FIXED_KEYS else _walk(value, write) for key, value in message.items()}
            for message in prompt.messages
        ]
        arguments = {key: _walk(value, write) for key, value in prompt.template_kwargs.items()}
        tools = [_rewritten_tool(tool, write) for tool in prompt.tools]
        documents = tuple(_walk(document, write) for document in prompt.documents)
    except RecursionError:
        raise invalid("messages", "are nested too deeply: send flatter tool arguments") from None
    return replace(prompt, messages=messages, template_kwargs=arguments, tools=tools, documents=documents)


def _rewritten_tool(tool: Mapping[str, Any], write: Callable[[str], str]) -> dict[str, Any]:
    return {**tool, "function": {key: _walk(value, write) for key, value in tool["function"].items()}}


def _walk(value: Any, write: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return write(value)
    if isinstance(value, Mapping):
        return {_walk(key, write): _walk(item, write) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_walk(item, write) for item in value]
    return value
