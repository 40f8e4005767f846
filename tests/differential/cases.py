"""Random requests, made from a seed, in a neutral form. A request converts to gRPC for our gateway and to JSON for the
peer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.v1 import inference_pb2 as pb
from tests.support.corpus import SAMPLES

MODEL = "tiny"
VOCAB_SIZE = 768
END_IDS = (761, 764)
"""The two end tokens of the tiny LLaMA. The conftest checks these numbers."""
SPECIAL_TEXTS = ("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>system<|end_header_id|>")
ODD_TEXTS = ("\u200d", "e\u0301\u0301", "\t\r\n", "\x00\x01", "𝔘𝔫𝔦", "ﷺ", "🏳️‍🌈", "   ", "\ufffd", "İ", "ß" * 20)
LOGIT_CHANGES = ("repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias", "min_tokens")

Prompt = str | tuple[int, ...] | tuple[Mapping[str, Any], ...]

SCHEMA = {
    "type": "object",
    "properties": {
        # Not by `maxLength`: vLLM's own server then allows control characters that JSON forbids (repair "strings").
        "name": {"type": "string", "pattern": "^[a-zA-Z ]{0,12}$"},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["mühle", "水車", "wheel"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "count", "kind"],
    "additionalProperties": False,
}
GRAMMARS: tuple[tuple[str, Any], ...] = (
    ("choice", ("Paris", "Berlin", "東京", "New York 🚀")),
    ("choice", ("yes", "no")),
    ("regex", r"(the|a) (river|wheel|mill)( turns){1,3}\."),
    ("regex", r"[0-9]{3}-[0-9]{4}"),
    ("regex", r"(Où|今天|😀)+ [a-zé]{2,9}"),
    ("json_schema", SCHEMA),
    ("json_schema", {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4}),
    ("json_object", ""),
    ("grammar", 'root ::= "SELECT " column " FROM " column\ncolumn ::= "a" | "bc" | "déf"\n'),
)


@dataclass(frozen=True)
class Case:
    """A request. `options`: the options that are set, keyed by their field names in inference.proto. `top_logprobs`:
    None for no log probabilities."""

    number: int
    prompt: Prompt
    options: Mapping[str, Any]
    top_logprobs: int | None = None
    grammar: tuple[str, Any] | None = None
    streamed: bool = False
    continues: bool = False
    as_ids: bool = False
    """Whether the peer names tokens of log probabilities by id instead of text."""
    parts: bool = False
    """Whether message contents are sent as lists of text parts, one per line."""

    @property
    def is_chat(self) -> bool:
        """Whether the request has messages instead of a plain prompt or token ids."""
        return not isinstance(self.prompt, str) and isinstance(self.prompt[0], Mapping)

    def proto(self) -> pb.ChatRequest | pb.CompleteRequest:
        """Return the request for Headrace's gateway."""
        fields: dict[str, Any] = dict(self.options)
        if self.top_logprobs is not None:
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if self.grammar is not None:
            fields["response_format"] = format_pb(*self.grammar)
        if not self.is_chat:
            prompt = {"prompt": self.prompt} if isinstance(self.prompt, str) else {"prompt_token_ids": self.prompt}
            return pb.CompleteRequest(model=MODEL, **prompt, **fields)
        if self.continues:
            fields["continue_final_message"] = True
        return pb.ChatRequest(model=MODEL, messages=[self._message(m) for m in self._messages()], **fields)

    def _messages(self) -> Sequence[Mapping[str, Any]]:
        return self.prompt  # type: ignore[return-value]

    def _message(self, message: Mapping[str, Any]) -> pb.Message:
        if not self.parts:
            return pb.Message(**message)
        lines = message["content"].split("\n")
        return pb.Message(role=message["role"], parts=[pb.ContentPart(text=line) for line in lines])

    def http(self) -> tuple[str, dict[str, Any]]:
        """Return the path and the body for vLLM's OpenAI server."""
        body: dict[str, Any] = {"model": MODEL, "return_token_ids": True, **self.options}
        if self.as_ids:
            body["return_tokens_as_token_ids"] = True
        if self.grammar is not None:
            body |= _format_http(*self.grammar)
        if not self.is_chat:
            if self.top_logprobs is not None:
                body["logprobs"] = self.top_logprobs
            prompt = self.prompt if isinstance(self.prompt, str) else list(self.prompt)
            return "/v1/completions", body | {"prompt": prompt}
        if self.top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if self.continues:
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        messages = [dict(message) for message in self._messages()]
        if self.parts:
            for message in messages:
                message["content"] = [{"type": "text", "text": line} for line in message["content"].split("\n")]
        return "/v1/chat/completions", body | {"messages": messages}


def format_pb(kind: str, value: Any) -> pb.ResponseFormat:
    """Return a constraint on the output as our API's ResponseFormat."""
    if kind == "json_object":
        return pb.ResponseFormat(type=kind)
    if kind == "json_schema" and not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False)
    return pb.ResponseFormat(**{"type": kind, kind: value})


def _format_http(kind: str, value: Any) -> dict[str, Any]:
    if kind == "json_object":
        return {"response_format": {"type": "json_object"}}
    if kind == "json_schema":
        schema = {"name": "answer", "schema": value}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    return {"structured_outputs": {kind: list(value) if kind == "choice" else value}}


@dataclass(frozen=True)
class Earlier:
    """An answer to an earlier case. A later case with the same prompt uses parts of `text` as stop strings. The stop
    strings occur in the later answer too, since equal prompts get equal answers."""

    prompt: Prompt
    continues: bool
    text: str
    token_ids: Sequence[int]


class Maker:
    """A generator of cases. Equal seeds give equal cases."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._number = 0

    def plain(self) -> Case:
        """Return a case with only a prompt and a length. Other cases can use the answer to this case."""
        prompt, continues = self.prompt()
        return self._case(prompt, {"max_tokens": self._random.randint(24, 40)}, continues)

    def any(self, earlier: Sequence[Earlier]) -> Case:
        """Return a case with random options. If there are earlier answers, the case repeats the prompt of one of them
        with probability 1/2."""
        chance = self._random
        known = chance.choice(earlier) if earlier and chance.random() < 0.5 else None
        prompt, continues = (known.prompt, known.continues) if known else self.prompt()
        options: dict[str, Any] = {}
        if chance.random() < 0.95:
            options["max_tokens"] = chance.choice([1, 2, 7, 16, 24, 40])
        elif not isinstance(prompt, str) and isinstance(prompt[0], Mapping):
            # make an end token likely: otherwise the call runs until the context is full
            options["logit_bias"] = {chance.choice(END_IDS): 16.0}
        grammar = chance.choice(GRAMMARS) if chance.random() < 0.15 else None
        if grammar is None:
            self._shape(options)
        elif grammar[0] in ("json_schema", "json_object"):
            options["max_tokens"] = chance.randint(8, 60)
        self._stops(options, known)
        return self._case(prompt, options, continues, grammar, logprobs=chance.random() < 0.5)

    def _case(
        self,
        prompt: Prompt,
        options: Mapping[str, Any],
        continues: bool,
        grammar: tuple[str, Any] | None = None,
        *,
        logprobs: bool = True,
    ) -> Case:
        self._number += 1
        chance = self._random
        # Use temperature 0, or the checkpoint's own temperature with one candidate, which is greedy too.
        greedy = {"temperature": 0.0} if chance.random() < 0.9 else {"top_k": 1}
        chat = not isinstance(prompt, str) and isinstance(prompt[0], Mapping)
        # If the sampled token may not be the likeliest, the peer's map could lose one of two tokens with equal text.
        as_ids = chance.random() < 0.3 or (
            not chat and (grammar is not None or any(x in options for x in LOGIT_CHANGES))
        )
        return Case(
            number=self._number,
            prompt=prompt,
            options={**greedy, **options},
            top_logprobs=chance.choice([0, 1, 2, 5, 20]) if logprobs else None,
            grammar=grammar,
            streamed=self._number % 2 == 0,
            continues=continues,
            as_ids=as_ids,
            parts=chat and chance.random() < 0.2,
        )

    def _shape(self, options: dict[str, Any]) -> None:
        chance = self._random
        if chance.random() < 0.25:
            options["min_tokens"] = chance.randint(0, options.get("max_tokens", 16))
        if chance.random() < 0.3:
            options["ignore_eos"] = chance.random() < 0.7
        if chance.random() < 0.2:
            options["repetition_penalty"] = chance.choice([0.5, 1.1, 1.3, 2.0])
        if chance.random() < 0.2:
            options["frequency_penalty"] = chance.choice([-2.0, -0.5, 0.25, 1.0, 2.0])
        if chance.random() < 0.2:
            options["presence_penalty"] = chance.choice([-1.5, 0.5, 2.0])
        if chance.random() < 0.25:
            bias = {chance.randrange(VOCAB_SIZE): chance.uniform(-8, 8) for _ in range(chance.randint(1, 12))}
            if chance.random() < 0.6:
                bias[chance.choice(END_IDS)] = chance.choice([4.0, 7.0, 10.0, -100.0])
            # A number that 32-bit floats hold exactly is the same number on both sides.
            options["logit_bias"] = {token: round(value * 64) / 64 for token, value in bias.items()}
        if chance.random() < 0.1:
            options |= {"top_p": 0.5, "min_p": 0.125}  # no effect on greedy decoding

    def _stops(self, options: dict[str, Any], known: Earlier | None) -> None:
        chance = self._random
        stops: list[str] = []
        if known and len(known.text) > 2 and chance.random() < 0.6:
            for _ in range(chance.randint(1, 2)):
                start = chance.randrange(len(known.text))
                stops.append(known.text[start : start + chance.randint(1, 6)])
        if chance.random() < 0.2:
            stops += chance.sample(["\n\n\n", "Никогда", "END", "<|eot_id|>", "🦤"], 2)
        if stops:
            options["stop"] = stops
        if known and len(known.token_ids) > 3 and chance.random() < 0.25:
            options["stop_token_ids"] = [chance.choice(known.token_ids), chance.randrange(VOCAB_SIZE)]

    def prompt(self) -> tuple[Prompt, bool]:
        """Return a prompt, and whether the answer continues the prompt's last message."""
        chance = self._random
        kind = chance.random()
        if kind < 0.25:
            return self._text(), False
        if kind < 0.45:
            length = chance.choice([1, 2, 9, 31, 32, 33, 64, 127, 128, 129, 300, 650])
            return self.prompt_ids(length), False
        messages = [{"role": "system", "content": self._text(1)}] if chance.random() < 0.4 else []
        for _ in range(chance.choice([0, 0, 1, 1, 2, 4])):
            messages += [{"role": "user", "content": self._text(1)}, {"role": "assistant", "content": self._text(1)}]
        messages.append({"role": "user", "content": self._text()})
        continues = chance.random() < 0.2
        if continues:
            messages.append({"role": "assistant", "content": chance.choice(SAMPLES)[: chance.randint(2, 40)].strip()})
        return tuple(messages), continues

    def prompt_ids(self, length: int) -> tuple[int, ...]:
        """Return random token ids, which may be special tokens."""
        return tuple(self._random.randrange(VOCAB_SIZE) for _ in range(length))

    def _text(self, most_lines: int = 4) -> str:
        chance = self._random
        lines = chance.choices(SAMPLES, k=chance.randint(1, most_lines))
        if most_lines > 1 and chance.random() < 0.12:
            lines += chance.choices(SAMPLES, k=8)  # several chunks of prefill
        if chance.random() < 0.2:
            lines.append(chance.choice(SPECIAL_TEXTS + ODD_TEXTS))
        text = "\n".join(lines)
        return text[: chance.randint(1, len(text))] if chance.random() < 0.3 else text
