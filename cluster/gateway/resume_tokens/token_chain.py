"""Content of resume tokens: the tokens of a stream's chunks form a chain that records what was delivered.

Problem: a stream that lost its gateway must continue at another one that does not know it, exactly, and only for its
own caller. So each chunk carries a sealed record of the model tokens that it delivered; the first record also names
caller, model and request. Invariant: a list of resume tokens is accepted only if it is the complete list of one call in
its order; each holds the digest of the sealed bytes of the one before.
So that a client need not keep thousands, a resume token is *whole* now and then: it repeats all that was delivered
before, and the list may begin with it.

A choice is recorded as far as its text was delivered: `token_ids` are the ids of which at least one character was
delivered, `chars` is the number of characters delivered of the choice in total. Ids whose text is held back, since it
may begin a stop string, belong to the next resume token.

Layout, little-endian: number (8), expiry in seconds since the epoch (8), digest of the token before (16), count of
choices (2); for each choice: index (2), finish (1), chars (8), count of ids (4), the ids (4 each); then JSON with
fields that are sent once: `call` in the first token, `likeness` (the compatibility key) by index with a choice's first
ids, and `homes` (the worker) by index whenever a choice's worker has changed. A whole token has `whole` and all of
these fields; its choices have all their ids. `maker` is in the first token that a gateway makes for a call, and in
whole ones; gateways of older releases make none and ignore it. `now` is an argument.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from cluster.api.types import CompatibilityKey

DIGEST_BYTES = 16
_HEAD = struct.Struct(f"<QQ{DIGEST_BYTES}sH")
_CHOICE = struct.Struct("<HBQI")
_SINGLE_ID = struct.Struct(f"<QQ{DIGEST_BYTES}sHHBQII")
"""A resume token with one id of one choice, as nearly all are."""
FINISHES = ("", "stop", "length", "tool_calls", "content_filter")
FIRST = b"\0" * DIGEST_BYTES
"""Digest in the first token, which has none before it."""


class InvalidToken(ValueError):
    """Bytes that are not a resume token, or not the next one of the call."""


@dataclass(frozen=True, slots=True)
class CallHead:
    """Identity of a call: its caller, model and request. Times are seconds since the epoch; a `deadline_s` of 0 means
    none. `request` and `prompt` are digests; `seed` is the requested or the drawn one."""

    call_id: str
    request_id: str
    tenant: str
    subject: str
    model: str
    request: str
    prompt: str
    seed: int | None = None
    deadline_s: float = 0.0
    opened_s: float = 0.0


class Maker(NamedTuple):
    """Origin of a resume token: the gateway's incarnation; the number of resumes of the call until that gateway; how
    many of these, the last in a row, brought no new token; and whether one has come since."""

    gateway: str = ""
    generation: int = 0
    silent: int = 0
    progressed: bool = False


UNKNOWN = Maker()
"""Origin of tokens of older releases, which name none."""
_HEAD_FIELDS = tuple(head_field.name for head_field in fields(CallHead))


@dataclass(frozen=True, slots=True)
class Choice:
    """The part of one choice that a resume token adds."""

    index: int
    token_ids: Sequence[int]
    chars: int
    """Characters of the choice delivered in total, not by this token alone."""
    finish_reason: str = ""


@dataclass(slots=True)
class ChoiceState:
    """State of a choice after all tokens of a chain."""

    token_ids: list[int] = field(default_factory=list)
    chars: int = 0
    finish_reason: str = ""
    compatibility: CompatibilityKey | None = None
    worker: str = ""
    """Incarnation of its last worker, which may still hold its KV blocks."""


@dataclass(slots=True)
class TokenChain:
    """State of a call as recorded by a list of resume tokens. `last` is the newest token's digest, `number` its
    number."""

    head: CallHead | None = None
    maker: Maker = field(default_factory=lambda: UNKNOWN)
    """Origin of the newest token."""
    number: int = 0
    expires_s: int = 0
    last: bytes = FIRST
    choices: dict[int, ChoiceState] = field(default_factory=dict)

    @property
    def call_head(self) -> CallHead:
        """Identity of the call; only for a chain that has a token."""
        assert self.head is not None, "nothing was added"
        return self.head

    @property
    def bundle_digest(self) -> str:
        """Digest of the tokenizer bundle that the call began with; "" if no choice has begun."""
        keys = (choice.compatibility for choice in self.choices.values())
        return next((key.bundle_digest for key in keys if key is not None), "")

    def add(self, sealed: bytes, body: bytes) -> None:
        """Add the next token and its opened content. Raises InvalidToken; then the chain must not be used further."""
        if self.number and len(body) == _SINGLE_ID.size:
            number, expires_s, before, count, index, finish, chars, tokens, token_id = _SINGLE_ID.unpack(body)
            if (count, finish, tokens) == (1, 0, 1):
                self._check_follows(before)
                self.number, self.expires_s, self.last = number, expires_s, digest_of(sealed)
                state = self._choice(index)
                state.token_ids.append(token_id)
                state.chars, state.finish_reason = chars, ""
                self._mark_progressed()
                return
        number, expires_s, before, choices, more = decode(body)
        if self.number or not more.get("whole"):
            self._check_follows(before)
        if more.get("whole"):
            self.head, self.choices, self.maker = None, {}, UNKNOWN
        if self.head is None:
            self.head = _head(more)
        self.number, self.expires_s, self.last = number, expires_s, digest_of(sealed)
        for index, words in more.get("likeness", {}).items():
            self._choice(int(index)).compatibility = CompatibilityKey(*words)
        for index, worker in more.get("homes", {}).items():
            self._choice(int(index)).worker = worker
        for choice in choices:
            state = self._choice(choice.index)
            state.token_ids += choice.token_ids
            state.chars = choice.chars
            state.finish_reason = choice.finish_reason
        if "maker" in more:
            self.maker = _maker(more)
        elif any(choice.token_ids for choice in choices):
            self._mark_progressed()

    def _mark_progressed(self) -> None:
        if not self.maker.progressed:
            self.maker = self.maker._replace(progressed=True)

    def _check_follows(self, before: bytes) -> None:
        if before != self.last:
            raise InvalidToken("is not the next of its call: send every token of one call, in order")

    def _choice(self, index: int) -> ChoiceState:
        return self.choices.setdefault(index, ChoiceState())


def digest_of(sealed: bytes) -> bytes:
    """The digest of a token that the next one holds. Short, since only gateways make tokens: a caller cannot search for
    two with the same digest."""
    return hashlib.sha256(sealed).digest()[:DIGEST_BYTES]


def encode_one(number: int, expires_s: int, before: bytes, chars: int, token_id: int) -> bytes:
    """Fast path of `encode`: one further id of choice 0, which does not finish."""
    return _SINGLE_ID.pack(number, expires_s, before, 1, 0, 0, chars, 1, token_id)


def encode(
    number: int, expires_s: int, before: bytes, choices: Sequence[Choice], more: Mapping[str, Any] | None = None
) -> bytes:
    """The content of a resume token, to be sealed."""
    parts = [_HEAD.pack(number, expires_s, before, len(choices))]
    for choice in choices:
        count = len(choice.token_ids)
        parts.append(_CHOICE.pack(choice.index, FINISHES.index(choice.finish_reason), choice.chars, count))
        parts.append(struct.pack(f"<{count}I", *choice.token_ids))
    if more:
        parts.append(json.dumps(more, separators=(",", ":")).encode())
    return b"".join(parts)


def decode(body: bytes) -> tuple[int, int, bytes, list[Choice], Mapping[str, Any]]:
    """Number, expiry, digest of the token before, choices and JSON fields of a token's content. Raises InvalidToken."""
    try:
        number, expires_s, before, count = _HEAD.unpack_from(body)
        at, choices = _HEAD.size, []
        for _ in range(count):
            index, finish, chars, tokens = _CHOICE.unpack_from(body, at)
            at += _CHOICE.size
            choices.append(Choice(index, struct.unpack_from(f"<{tokens}I", body, at), chars, FINISHES[finish]))
            at += 4 * tokens
        more = json.loads(body[at:]) if at < len(body) else {}
    except (struct.error, IndexError, ValueError) as error:
        raise InvalidToken(f"is no resume token of this release: {error}") from None
    if not isinstance(more, dict):
        raise InvalidToken("is no resume token of this release")
    return number, expires_s, before, choices, more


def _maker(more: Mapping[str, Any]) -> Maker:
    try:
        gateway, generation, silent, progressed = more["maker"]
        return Maker(str(gateway), int(generation), int(silent), bool(progressed))
    except (TypeError, ValueError):
        raise InvalidToken("is no resume token of this release") from None


def head_json(head: CallHead) -> dict[str, Any]:
    """The JSON field "call" of a token."""
    return {name: getattr(head, name) for name in _HEAD_FIELDS}


def compatibility_json(key: CompatibilityKey) -> list[str]:
    """An entry of a token's JSON field "likeness"."""
    return [key.weight_digest, key.bundle_digest, key.engine_class]


def _head(more: Mapping[str, Any]) -> CallHead:
    try:
        return CallHead(**more["call"])
    except (KeyError, TypeError):
        raise InvalidToken("is not the first of its call: send every token of one call, in order") from None
