"""Log probabilities in the JSON of OpenAI's chat completions and completions.

The JSON of a token is written by hand, because an answer may have millions of tokens with their alternatives, and
encoding a dictionary for each of them takes three times as long.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from math import isfinite
from typing import Any, Final

from cluster.gateway.apis.whole_logprobs import EncodedList
from cluster.gateway.text.logprobs import TokenLogprob

_encode = json.JSONEncoder(separators=(",", ":")).encode
_escape = json.encoder.encode_basestring_ascii
_decimal_of = tuple(map(str, range(256))).__getitem__
_NULL: Final = b"null"


def chat_logprobs(logprobs: Sequence[TokenLogprob]) -> str:
    """Return log probabilities as the JSON of OpenAI's chat completions."""
    return f'{{"content":[{",".join(map(_position, logprobs))}]}}'


def _position(t: TokenLogprob) -> str:
    """Return a sampled token and its alternatives as JSON."""
    return f'{_token(t)[:-1]},"top_logprobs":[{",".join(map(_token, t.top))}]}}'


def _token(t: TokenLogprob) -> str:
    number = t.logprob
    shown = repr(number) if isfinite(number) else _encode(number)
    numbers = ",".join(map(_decimal_of, t.token_bytes))
    return f'{{"token":{_escape(t.token)},"logprob":{shown},"bytes":[{numbers}]}}'


class TextOffsets:
    """Text offsets of the tokens in a completion. The offset of a token is the number of characters in the earlier
    tokens of the same choice."""

    def __init__(self) -> None:
        self._next: defaultdict[int, int] = defaultdict(int)

    def logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """Return the log probabilities of the next tokens of a choice, in the shape of OpenAI's completions."""
        offsets = []
        for t in logprobs:
            offsets.append(self._next[index])
            self._next[index] += len(t.token)
        return {
            "text_offset": offsets,
            "token_logprobs": [t.logprob for t in logprobs],
            "tokens": [t.token for t in logprobs],
            "top_logprobs": [{other.token: other.logprob for other in t.top} for t in logprobs],
        }


class ChatLogprobs:
    """Encodes the log probabilities of one choice of a chat answer. Implements ChoiceLogprobs."""

    def __init__(self) -> None:
        self._positions = EncodedList(b",")

    @property
    def size(self) -> int:
        """Approximate number of encoded bytes. Implements ChoiceLogprobs."""
        return self._positions.size

    def add(self, t: TokenLogprob) -> None:
        """Add the next token. Implements ChoiceLogprobs."""
        self._positions.add(_position(t).encode("ascii"))

    def parts(self) -> list[bytes | bytearray]:
        """Return the JSON in parts: `null` without tokens. Implements ChoiceLogprobs."""
        blocks = self._positions.blocks
        return [b'{"content":[', *blocks, b"]}"] if blocks else [_NULL]


class CompletionLogprobs:
    """Encodes the log probabilities of one choice of a completion answer. Implements ChoiceLogprobs."""

    def __init__(self) -> None:
        self._offsets = TextOffsets()
        self._columns: dict[str, EncodedList] = {}

    @property
    def size(self) -> int:
        """Approximate number of encoded bytes. Implements ChoiceLogprobs."""
        return sum(column.size for column in self._columns.values())

    def add(self, t: TokenLogprob) -> None:
        """Add the next token. Implements ChoiceLogprobs."""
        columns = self._columns
        for name, values in self._offsets.logprobs(0, (t,)).items():
            if name not in columns:
                columns[name] = EncodedList(b",")
            columns[name].add(_encode(values[0]).encode("ascii"))

    def parts(self) -> list[bytes | bytearray]:
        """Return the JSON in parts: `null` without tokens. Implements ChoiceLogprobs."""
        parts: list[bytes | bytearray] = []
        for name, column in self._columns.items():
            parts += [f'{"," if parts else "{"}"{name}":['.encode("ascii"), *column.blocks, b"]"]
        return [*parts, b"}"] if parts else [_NULL]
