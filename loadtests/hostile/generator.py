"""Seeded generator of hostile calls over all fields: invalid values, and values that are valid but extreme.

Each call exists twice: as the bytes of a request of inference.proto, which need not be valid, and as JSON for OpenAI's
HTTP API. One to four fields of a call are hostile and the rest ordinary, so that most hostile fields get past the
checks of the other fields.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cluster.v1 import inference_pb2 as pb

INT32, INT64, UINT32 = 2**31 - 1, 2**63 - 1, 2**32 - 1
VOCABULARY: Final = 760
"""Vocabulary size of the scenarios' models. Token ids below this value are valid."""
LONG, HUGE = 5_000, 300_000
HUGE_ODDS: Final = 0.02
"""Probability of a huge value. Such calls cost the attacker most of the attacker's time."""
NOT_TEXT: Final = (b"\xed\xa0\x80", b"\xff\xfe", b"a\xed\xbf\xbfb", b"\xc0\x80", b"\xf5\x80\x80\x80")
"""Lone surrogates and other bytes that are not UTF-8."""
SURROGATES: Final = ("\ud800", "\udfff", "a\ud83d", "\udc00b")
PATTERNS: Final = (
    "(a+)+$",
    "(" * 400,
    "[a-z]{1000}{1000}",
    "(?=x)",
    "\\",
    "[",
    "(a|" * 60 + "b" + ")" * 60,
    "^$",
    "()",
)
GRAMMARS: Final = ("root ::= root", "root ::= ", "start: start", "::=", 'root ::= "a"' * 30, "?" * 99)
SCHEMAS: Final = (
    "{", "null", "[]", "1e999", '{"$ref": "#"}', '{"type": "nonsense"}', '{"enum": []}', '{"minItems": 1e308}',
    '{"type": "array", "items": ' * 200, '{"not": ' * 90 + "{}" + "}" * 90, '{"pattern": "(a+)+$", "type": "string"}',
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Hostile:
    """A hostile call. `chat`: True for a chat request, False for a completion request. `fields`: names of the hostile
    fields, for a report."""

    chat: bool
    message: bytes
    body: bytes
    fields: Sequence[str]


class Generator:
    """Endless source of hostile calls."""

    def __init__(self, seed: int, model: str, vocabulary: int = VOCABULARY) -> None:
        self._rng = random.Random(seed)
        self._model = model
        self._vocabulary = vocabulary

    def generate(self, count: int) -> Iterator[Hostile]:
        """Generate `count` calls."""
        for _ in range(count):
            yield self._one()

    def _one(self) -> Hostile:
        rng = self._rng
        chat = rng.random() < 0.5
        names = rng.sample(sorted(FIELDS), rng.randint(1, 4))
        fields = {name: FIELDS[name](self) for name in names}
        return Hostile(chat, self._bytes(chat, fields), self._json(chat, fields), names)

    # ---- values

    def text(self) -> str:
        """Return any text that is valid UTF-8."""
        rng = self._rng
        if rng.random() < HUGE_ODDS:
            return rng.choice(["x", "\u20ac", "\U0001f600", "{", " "]) * HUGE
        return rng.choice(
            ["", "\0", "x" * LONG, "\u202e\u2066", "\U0001f600" * 99, "\r\n\x1b[31m", "{{ x }}", "{% for", "\ufffd" * 9]
        )

    def number(self) -> float:
        """Return any float, including NaN and infinity."""
        return self._rng.choice(
            [0.0, -0.0, 1e-45, -1e-45, 1.0, 2.0, 2.0000002, -2.0, 1e6, 1e38, -1e38, float("nan"), float("inf"), -0.5]
        )

    def integer(self, most: int = INT32) -> int:
        """Return any integer from -`most` - 1 to `most`; by default, any 32-bit integer."""
        return self._rng.choice([0, 1, -1, 2, 64, 65, 128, 1024, most, most - 1, -most - 1, 2**15])

    def ids(self) -> list[int]:
        """Return a random list of token ids. The list may be empty, short, as long as allowed, or too long. Some ids
        may be outside the vocabulary."""
        rng = self._rng
        count = rng.choice([0, 1, 128, 129, 1024, 1025])
        if rng.random() < HUGE_ODDS:
            count = HUGE
        high = rng.choice([self._vocabulary, INT32 + 1])
        return [rng.randrange(high) for _ in range(count)] + rng.choice([[], [-1]])

    def bias(self) -> dict[int, float]:
        """Return a logit bias for a random number of tokens, which may be above the allowed number."""
        count = self._rng.choice([1, 300, 1024, 1025, 3000])
        return {number % INT32: self._rng.choice([-100.0, 100.0, 0.0, self.number()]) for number in range(count)}

    def format(self) -> dict[str, Any]:
        """Return a response format of any kind."""
        rng = self._rng
        kind = rng.choice(["json_object", "json_schema", "regex", "choice", "grammar", "text", "nonsense"])
        choice = rng.choice([[], [""], ["a"] * 999, ["x" * 90] * 1500, [self.text()], ["a", "a"]])
        many = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(300)}}
        values: dict[str, Any] = {
            "json_schema": rng.choice([*SCHEMAS, json.dumps(many), self.text()]),
            "regex": rng.choice([*PATTERNS, self.text()]),
            "choice": choice,
            "grammar": rng.choice([*GRAMMARS, self.text()]),
        }
        return {"type": kind, **({kind: values[kind]} if kind in values else {})}

    # ---- encoding

    def _bytes(self, chat: bool, fields: Mapping[str, Any]) -> bytes:
        request: Any = pb.ChatRequest if chat else pb.CompleteRequest
        names = {field.name for field in request.DESCRIPTOR.fields}
        message = request(model=self._model, max_tokens=self._rng.randint(1, 4), temperature=0.0)
        if chat:
            message.messages.add(role="user", content="Hello")
        else:
            message.prompt = "Hello"
        for name, value in fields.items():
            if name in names and not (name == "messages" and not chat):
                self._set(message, name, value)
        data: bytes = message.SerializeToString()
        return data + self._not_text(message) if self._rng.random() < 0.3 else data

    def _set(self, message: Any, name: str, value: Any) -> None:
        message.ClearField(name)
        if name == "response_format":
            message.response_format.CopyFrom(pb.ResponseFormat(**value))
        elif name == "messages":
            message.messages.extend(pb.Message(role=role, content=text) for role, text in value)
        elif isinstance(value, dict):
            getattr(message, name).update(value)
        elif isinstance(value, list):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)

    def _not_text(self, message: Any) -> bytes:
        """Return an encoded text field that is not valid UTF-8. Appended to an encoded message, it replaces the field's
        earlier value."""
        rng = self._rng
        texts = [field for field in message.DESCRIPTOR.fields if field.type == field.TYPE_STRING]
        bad = rng.choice(NOT_TEXT)
        grammar = next(field for field in message.DESCRIPTOR.fields if field.name == "response_format")
        if rng.random() < 0.5:
            inner = rng.choice([(1, b"regex"), (1, b"choice")])
            parts = length_delimited(*inner) + length_delimited(3 if inner[1] == b"regex" else 4, bad)
            return length_delimited(grammar.number, parts)
        return length_delimited(rng.choice(texts).number, bad)

    def _json(self, chat: bool, fields: Mapping[str, Any]) -> bytes:
        rng = self._rng
        body: dict[str, Any] = {"model": self._model, "max_tokens": rng.randint(1, 4), "temperature": 0}
        body |= {"messages": [{"role": "user", "content": "Hello"}]} if chat else {"prompt": "Hello"}
        for name, value in fields.items():
            body[_JSON.get(name, name)] = self._twisted(name, value)
        encoded = json.dumps(body, ensure_ascii=rng.random() < 0.7)
        way = rng.random()
        if way < 0.85:
            return encoded.encode("utf-8", "surrogatepass")
        if way < 0.9:
            return encoded.encode("utf-16", "surrogatepass")
        return encoded.encode("utf-8", "surrogatepass")[: rng.randrange(len(encoded))] if way < 0.95 else _DEEP

    def _twisted(self, name: str, value: Any) -> Any:
        """Return the value unchanged, a value of another type, or a value with a lone surrogate."""
        rng = self._rng
        if name == "messages":
            value = [{"role": role, "content": text} for role, text in value]
        if name == "response_format" and rng.random() < 0.4:
            return {"type": "regex", "regex": rng.choice(SURROGATES)}
        way = rng.random()
        if way < 0.6:
            return value
        return rng.choice([*SURROGATES, None, True, [], {}, [[[]]], "1", 1e308, -1, {"a": {"b": [value]}}, [None, 1]])


def length_delimited(number: int, data: bytes) -> bytes:
    """Return an encoded length-delimited field."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


_DEEP: Final = b'{"messages": ' + b"[" * 20_000
_JSON: Final = {"prompt_token_ids": "prompt", "chat_template_kwargs_json": "chat_template_kwargs"}
FIELDS: Final[Mapping[str, Callable[[Generator], Any]]] = {
    "model": Generator.text,
    "messages": lambda values: [(values.text(), values.text()), ("user", values.text())],
    "prompt": Generator.text,
    "prompt_token_ids": Generator.ids,
    "max_tokens": Generator.integer,
    "min_tokens": Generator.integer,
    "temperature": Generator.number,
    "top_p": Generator.number,
    "top_k": Generator.integer,
    "min_p": Generator.number,
    "seed": lambda values: values.integer(INT64),
    "stop": lambda values: [values.text() for _ in range(3)],
    "stop_token_ids": Generator.ids,
    "n": Generator.integer,
    "frequency_penalty": Generator.number,
    "presence_penalty": Generator.number,
    "repetition_penalty": Generator.number,
    "logit_bias": Generator.bias,
    "top_logprobs": Generator.integer,
    "user": Generator.text,
    "response_format": Generator.format,
    "chat_template_kwargs_json": Generator.text,
    "cache_salt": Generator.text,
    "priority": Generator.text,
    "metadata": lambda values: {values.text(): values.text()},
}
"""Functions that generate a value, by field name of inference.proto. A request type that lacks a field skips it."""
