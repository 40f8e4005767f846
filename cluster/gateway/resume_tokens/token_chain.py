"""Content of resume tokens. The tokens in the chunks of a stream form a chain, which records what was delivered.

Problem: a stream that lost its gateway must continue exactly at another gateway, which does not know the stream, and
only for the stream's own caller. So each chunk carries a sealed record of the model tokens that the chunk delivers. The
first record also names caller, model and request. Invariant: a list of resume tokens is accepted only if it is the
complete list of one call in the right order. Each resume token holds the digest of the sealed bytes of the previous
resume token.

Now and then a resume token is *whole*: it repeats everything that was delivered before. A list may begin with a whole
token. A client therefore need not keep thousands of resume tokens.

A choice (one output of the call) is recorded as far as its text was delivered. `token_ids` are the ids of which at
least one character was delivered. `chars` is the total number of delivered characters of the choice. Text that may
begin a stop string is held back; the ids of such text belong to the next resume token.

Layout, little-endian: number (8 bytes), expiry in seconds since the epoch (8), digest of the previous token (16), count
of choices (2); for each choice: index (2), finish (1), chars (8), count of ids (4), the ids (4 each); then, if needed,
a JSON object. Its fields: `call`, in the first token; `likeness`, a map from choice index to compatibility key, in the
token with the first ids of a choice; `homes`, a map from choice index to worker, in the first token after a change of
the worker; `maker`, in the first token that a gateway makes for a call. A whole token has `whole`, all of these fields,
and all ids of its choices. Older releases neither make nor read `maker`.
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
"""Layout of a resume token with one id of one choice. Nearly all resume tokens have this layout."""
FINISHES = ("", "stop", "length", "tool_calls", "content_filter")
FIRST = b"\0" * DIGEST_BYTES
"""Digest in the first token, which has no previous token."""


class InvalidToken(ValueError):
    """The error for bytes that are not a resume token, or not the next resume token of the call."""


@dataclass(frozen=True, slots=True)
class CallHead:
    """The identity of a call: caller, model and request. Times are seconds since the epoch. A `deadline_s` of 0 means
    no deadline. `request` and `prompt` are digests. `seed` is None if the request has no seed. `model`: full name of
    the model or adapter. `adapter_digest`: digest of the adapter, "" for none."""

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
    adapter_digest: str = ""


class Maker(NamedTuple):
    """The gateway that made a resume token. `gateway`: incarnation of this gateway. `generation`: number of the resume
    after which the call ran at this gateway, 0 if the call began there. `silent`: number of resumes in a row that
    delivered no new model token, directly before the resume `generation`. `progressed`: whether this gateway has
    delivered a new model token."""

    gateway: str = ""
    generation: int = 0
    silent: int = 0
    progressed: bool = False


UNKNOWN = Maker()
"""Origin of the tokens of older releases, which name no origin."""
_HEAD_FIELDS = tuple(head_field.name for head_field in fields(CallHead))


@dataclass(frozen=True, slots=True)
class Choice:
    """The record of one choice (one output of the call) in one resume token: the token ids that the resume token adds
    to the choice, and the choice's state after them."""

    index: int
    token_ids: Sequence[int]
    chars: int
    """Total number of delivered characters of the choice, not only those of this token."""
    finish_reason: str = ""


@dataclass(slots=True)
class ChoiceState:
    """The state of a choice (one output of the call) after all tokens of a chain."""

    token_ids: list[int] = field(default_factory=list)
    chars: int = 0
    finish_reason: str = ""
    compatibility: CompatibilityKey | None = None
    worker: str = ""
    """Incarnation of the choice's last worker, which may still hold the choice's KV blocks."""


@dataclass(slots=True)
class TokenChain:
    """The state of a call that a list of resume tokens records. `last` is the digest of the newest token, and `number`
    is the number of the newest token."""

    head: CallHead | None = None
    maker: Maker = field(default_factory=lambda: UNKNOWN)
    """Origin of the newest token."""
    number: int = 0
    expires_s: int = 0
    last: bytes = FIRST
    choices: dict[int, ChoiceState] = field(default_factory=dict)
    traceparent: str = ""
    """Context of the call's span at the last gateway that has traced it; "" without one."""

    @property
    def call_head(self) -> CallHead:
        """Identity of the call. The chain must have at least one token."""
        assert self.head is not None, "nothing was added"
        return self.head

    @property
    def bundle_digest(self) -> str:
        """Digest of the tokenizer bundle with which the call began; "" if no choice has begun."""
        keys = (choice.compatibility for choice in self.choices.values())
        return next((key.bundle_digest for key in keys if key is not None), "")

    def add(self, sealed: bytes, body: bytes) -> None:
        """Add the next token. `sealed`: the token. `body`: its decrypted content. Raises InvalidToken; after this
        error, the chain must not be used."""
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
        self.traceparent = str(more.get("trace", self.traceparent))
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
    """Return the digest of a resume token. The call's next resume token contains this digest. A short digest is safe:
    only gateways make tokens, so a caller cannot search for two tokens with the same digest."""
    return hashlib.sha256(sealed).digest()[:DIGEST_BYTES]


def encode_one(number: int, expires_s: int, before: bytes, chars: int, token_id: int) -> bytes:
    """Return the content of a resume token for a call whose choice 0 has emitted one more token id and has not
    finished. The result is the same as that of `encode`, but faster to compute."""
    return _SINGLE_ID.pack(number, expires_s, before, 1, 0, 0, chars, 1, token_id)


def encode(
    number: int, expires_s: int, before: bytes, choices: Sequence[Choice], more: Mapping[str, Any] | None = None
) -> bytes:
    """Return the content of a resume token, which the caller must then seal. `number`: the token's position in the
    chain. `before`: digest of the previous token. `choices`: the emitted tokens of each choice. `more`: further fields,
    stored as a JSON object at the end."""
    parts = [_HEAD.pack(number, expires_s, before, len(choices))]
    for choice in choices:
        count = len(choice.token_ids)
        parts.append(_CHOICE.pack(choice.index, FINISHES.index(choice.finish_reason), choice.chars, count))
        parts.append(struct.pack(f"<{count}I", *choice.token_ids))
    if more:
        parts.append(json.dumps(more, separators=(",", ":")).encode())
    return b"".join(parts)


def decode(body: bytes) -> tuple[int, int, bytes, list[Choice], Mapping[str, Any]]:
    """Decode the content of a token. Returns the number, the expiry, the digest of the previous token, the choices and
    the JSON fields. Raises InvalidToken."""
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
    """Return the value of a token's JSON field "call"."""
    values = {name: getattr(head, name) for name in _HEAD_FIELDS}
    if not head.adapter_digest:  # older releases refuse unknown fields
        del values["adapter_digest"]
    return values


def compatibility_json(key: CompatibilityKey) -> list[str]:
    """Return a compatibility key as an entry of the JSON field "likeness" of a resume token."""
    return [key.weight_digest, key.bundle_digest, key.engine_class]


def _head(more: Mapping[str, Any]) -> CallHead:
    try:
        return CallHead(**more["call"])
    except (KeyError, TypeError):
        raise InvalidToken("is not the first of its call: send every token of one call, in order") from None
