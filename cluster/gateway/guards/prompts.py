"""The texts of a prompt that reach a model, in order, and the prompt with other texts in their place.

Of messages that is all a caller writes: contents, names, reasoning, tool calls with the keys of their arguments, and
the values of template arguments. Each is one text: nothing is looked for across two of them, since a template writes
between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.api.outcomes import invalid
from cluster.gateway.calls.request import ChatPrompt, TextPrompt

_OURS = frozenset({"role", "type"})
"""Of a message: words that are checked, and that templates compare."""


def texts_of(prompt: ChatPrompt | TextPrompt) -> list[str]:
    """Raises CallError for what is nested too deeply to be read."""
    texts: list[str] = []

    def note(text: str) -> str:
        texts.append(text)
        return text

    _rewritten(prompt, note)
    return texts


def with_texts(prompt: ChatPrompt | TextPrompt, texts: Sequence[str]) -> ChatPrompt | TextPrompt:
    """The prompt with these in place of `texts_of`."""
    rest = iter(texts)
    return _rewritten(prompt, lambda text: next(rest))


def messages_of(prompt: object) -> int:
    """How many messages; a plain prompt is one."""
    return len(prompt.messages) if isinstance(prompt, ChatPrompt) else 1


def _rewritten(prompt: ChatPrompt | TextPrompt, write: Callable[[str], str]) -> ChatPrompt | TextPrompt:
    if isinstance(prompt, TextPrompt):
        return TextPrompt(write(prompt.text))
    try:
        messages = [
            {key: value if key in _OURS else _walk(value, write) for key, value in message.items()}
            for message in prompt.messages
        ]
        arguments = {key: _walk(value, write) for key, value in prompt.template_kwargs.items()}
    except RecursionError:
        raise invalid("messages", "are nested too deeply: send tool arguments that are flatter") from None
    return replace(prompt, messages=messages, template_kwargs=arguments)


def _walk(value: Any, write: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return write(value)
    if isinstance(value, Mapping):
        return {_walk(key, write): _walk(item, write) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_walk(item, write) for item in value]
    return value
