"""Escaping of control tokens in those texts of a chat that come from neither the model nor its operator.

Problem: a tokenizer turns the text `<|im_end|>` into the control token wherever the text occurs. So a caller's text can
end the caller's message and begin a message of the assistant. (transformers and vLLM allow this.) With the model option
`control_tokens_in_content: escape`, a separator is put after the first character of each control token in contents of
users, tool results and documents: `< |im_end|>`.

Invariant: an escaped text contains no control token. A separator is put into every occurrence, overlapping ones
included. No control token contains the separator, so the separator cannot complete another token.

The worker chooses tokens and separator when it makes the tokenizer bundle (worker/weights/tokenizer_bundle.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

ROLES: Final = ("user", "tool")
_Trie = dict[str, Any]


class ControlTokens:
    """The control tokens of a tokenizer. Immutable."""

    def __init__(self, tokens: Iterable[str], separator: str) -> None:
        """`tokens`: the texts of the control tokens, each of two characters or more. `separator`: a character that is
        in none of the texts. It is put after the first character of a control token to escape the token."""
        trie = _trie(tokens)
        self._separator = separator
        self._start = re.compile(f"(?={_expression(trie)}).", re.DOTALL) if trie else None

    def escaped(self, text: str) -> str:
        """Return a text with its control tokens escaped. Takes linear time."""
        return text if self._start is None else self._start.sub(lambda found: found[0] + self._separator, text)

    def in_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return all messages. In the messages of users and tools, the control tokens in contents and names are
        escaped; other messages are unchanged."""
        return [self._in_message(message) if message.get("role") in ROLES else message for message in messages]

    def in_documents(self, documents: object) -> object:
        """Return the documents, with all texts in them escaped."""
        match documents:
            case str():
                return self.escaped(documents)
            case list() | tuple():
                return [self.in_documents(item) for item in documents]
            case dict():
                return {key: self.in_documents(item) for key, item in documents.items()}
            case _:
                return documents

    def _in_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        out, content, name = dict(message), message.get("content"), message.get("name")
        if isinstance(name, str):
            out["name"] = self.escaped(name)
        if isinstance(content, str):
            out["content"] = self.escaped(content)
        elif content:
            out["content"] = self._in_parts(content)
        return out

    def _in_parts(self, parts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return the parts of a message with escaped texts. If the texts contain a control token when they are joined,
        as a template may do, return one part with the whole escaped text instead."""
        texts = [self.escaped(part["text"]) for part in parts]
        together = "".join(texts)
        if (escaped := self.escaped(together)) != together:
            return [{**parts[0], "text": escaped}]
        return [{**part, "text": text} for part, text in zip(parts, texts, strict=True)]


def _trie(tokens: Iterable[str]) -> _Trie:
    """Return the tokens as a trie: nested dictionaries by character. The key "" marks the end of a token."""
    root: _Trie = {}
    for token in tokens:
        node = root
        for character in token:
            node = node.setdefault(character, {})
        node[""] = {}
    return root


def _expression(node: _Trie) -> str:
    """Return a regular expression for the tokens of a trie. At each position, the expression matches the shortest
    token. A run of characters without alternatives becomes one literal, so that groups are not nested deeply."""
    literal = ""
    while len(node) == 1 and "" not in node:
        ((character, node),) = node.items()
        literal += re.escape(character)
    if "" in node:
        return literal
    options = [re.escape(character) + _expression(following) for character, following in node.items()]
    return f"{literal}(?:{'|'.join(options)})"
