"""What a resume token says: how far a stream had come, as the chain of what its chunks delivered.

Problem: a stream that outlives its gateway must go on at one that has never heard of it, exactly, and only for its own
caller. So each chunk says, sealed, which tokens it delivered; the first one says besides whose call it is, of which
model and under which request. Invariant: a list of tokens is accepted only if it is the whole list of one call, each
made for the one before (by the digest of its sealed bytes), in the order in which they were made.
So that nobody has to keep and show thousands, one now and then is *whole*: it says all that those before it do, and the
list may begin with it.

A choice is cut where its text was delivered: `token_ids` are those of whose text a character at least was delivered,
and `chars` how many characters of the choice were in all. Tokens whose text is held back, since it may begin a stop
string, belong to the next segment.

Layout of a segment, little-endian: number (8), expiry in seconds since the epoch (8), digest of the token before (16),
count of choices (2); of each: index (2), finish (1), chars (8), count of ids (4), the ids (4 each); then JSON with what
comes only once: `call` in the first token, `likeness` by index with a choice's first ids, and `homes` by index
whenever a choice has a worker that the tokens before did not name. A whole one has `whole`, and all of these; its
choices have all their ids. `maker` comes with the first token that a gateway makes for a call, and with whole ones;
gateways of older releases make none and ignore it. `now` is an argument.
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
_ONE = struct.Struct(f"<QQ{DIGEST_BYTES}sHHBQII")
"""A segment with one token of one choice: nearly all are."""
FINISHES = ("", "stop", "length", "tool_calls", "content_filter")
FIRST = b"\0" * DIGEST_BYTES
"""Stands for the token before the first."""


class BadSegment(ValueError):
    """No segment, or not the next of its call."""


@dataclass(frozen=True, slots=True)
class CallHead:
    """Whose call it is and what it was. Times are seconds since the epoch; `deadline_s` 0 is none. `request` and
    `prompt` are digests; `seed` is the one drawn or asked for."""

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
    """Who made a token: the gateway's incarnation; how often the call had been resumed when it came there; how many
    times in a row by then without a new token; and whether a new one has come since."""

    gateway: str = ""
    generation: int = 0
    silent: int = 0
    progressed: bool = False


UNKNOWN = Maker()
"""A gateway whose release does not say."""
_HEAD_FIELDS = tuple(one.name for one in fields(CallHead))


@dataclass(frozen=True, slots=True)
class Choice:
    """What a segment adds to one choice."""

    index: int
    token_ids: Sequence[int]
    chars: int
    """Of its text delivered in all, not by this segment alone."""
    finish_reason: str = ""


@dataclass(slots=True)
class Begun:
    """A choice as all segments together leave it."""

    token_ids: list[int] = field(default_factory=list)
    chars: int = 0
    finish_reason: str = ""
    likeness: CompatibilityKey | None = None
    home: str = ""
    """Incarnation of the worker that made the newest, and may have its KV blocks still."""


@dataclass(slots=True)
class TokenChain:
    """Segments put together. `last` is the digest of the newest token, `number` its number."""

    head: CallHead | None = None
    maker: Maker = field(default_factory=lambda: UNKNOWN)
    """Whose tokens the newest are."""
    number: int = 0
    expires_s: int = 0
    last: bytes = FIRST
    choices: dict[int, Begun] = field(default_factory=dict)

    @property
    def whole(self) -> CallHead:
        """Whose call it is, of a chain that has a first segment."""
        assert self.head is not None, "nothing was added"
        return self.head

    @property
    def bundle_digest(self) -> str:
        """Of the tokenizer that the call was begun with; "" where nothing has begun."""
        return next((one.likeness.bundle_digest for one in self.choices.values() if one.likeness is not None), "")

    def add(self, sealed: bytes, body: bytes) -> None:
        """The next token, and what was in it. Raises BadSegment; then the chain is spoilt."""
        if self.number and len(body) == _ONE.size:
            number, expires_s, before, count, index, finish, chars, tokens, token_id = _ONE.unpack(body)
            if (count, finish, tokens) == (1, 0, 1):
                self._follows(before)
                self.number, self.expires_s, self.last = number, expires_s, digest_of(sealed)
                begun = self._begun(index)
                begun.token_ids.append(token_id)
                begun.chars, begun.finish_reason = chars, ""
                self._progressed()
                return
        number, expires_s, before, choices, more = decode(body)
        if self.number or not more.get("whole"):
            self._follows(before)
        if more.get("whole"):
            self.head, self.choices, self.maker = None, {}, UNKNOWN
        if self.head is None:
            self.head = _head(more)
        self.number, self.expires_s, self.last = number, expires_s, digest_of(sealed)
        for index, words in more.get("likeness", {}).items():
            self._begun(int(index)).likeness = CompatibilityKey(*words)
        for index, home in more.get("homes", {}).items():
            self._begun(int(index)).home = home
        for one in choices:
            begun = self._begun(one.index)
            begun.token_ids += one.token_ids
            begun.chars = one.chars
            begun.finish_reason = one.finish_reason
        if "maker" in more:
            self.maker = _maker(more)
        elif any(one.token_ids for one in choices):
            self._progressed()

    def _progressed(self) -> None:
        if not self.maker.progressed:
            self.maker = self.maker._replace(progressed=True)

    def _follows(self, before: bytes) -> None:
        if before != self.last:
            raise BadSegment("is not the next of its call: send every token of one call, in order")

    def _begun(self, index: int) -> Begun:
        return self.choices.setdefault(index, Begun())


def digest_of(sealed: bytes) -> bytes:
    """What the next token says of this one. Only gateways make tokens, so nobody can look for two with one digest."""
    return hashlib.sha256(sealed).digest()[:DIGEST_BYTES]


def encode_one(number: int, expires_s: int, before: bytes, chars: int, token_id: int) -> bytes:
    """`encode` of a further token of choice 0 that goes on."""
    return _ONE.pack(number, expires_s, before, 1, 0, 0, chars, 1, token_id)


def encode(
    number: int, expires_s: int, before: bytes, choices: Sequence[Choice], more: Mapping[str, Any] | None = None
) -> bytes:
    """A segment's bytes, to be sealed."""
    parts = [_HEAD.pack(number, expires_s, before, len(choices))]
    for one in choices:
        count = len(one.token_ids)
        parts.append(_CHOICE.pack(one.index, FINISHES.index(one.finish_reason), one.chars, count))
        parts.append(struct.pack(f"<{count}I", *one.token_ids))
    if more:
        parts.append(json.dumps(more, separators=(",", ":")).encode())
    return b"".join(parts)


def decode(body: bytes) -> tuple[int, int, bytes, list[Choice], Mapping[str, Any]]:
    """Number, expiry, digest of the token before, choices, and what comes only once. Raises BadSegment."""
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
        raise BadSegment(f"holds no segment of this release: {error}") from None
    if not isinstance(more, dict):
        raise BadSegment("holds no segment of this release")
    return number, expires_s, before, choices, more


def _maker(more: Mapping[str, Any]) -> Maker:
    try:
        gateway, generation, silent, progressed = more["maker"]
        return Maker(str(gateway), int(generation), int(silent), bool(progressed))
    except (TypeError, ValueError):
        raise BadSegment("holds no segment of this release") from None


def head_json(head: CallHead) -> dict[str, Any]:
    """As `more["call"]` has it."""
    return {name: getattr(head, name) for name in _HEAD_FIELDS}


def likeness_json(likeness: CompatibilityKey) -> list[str]:
    """As `more["likeness"]` has it."""
    return [likeness.weight_digest, likeness.bundle_digest, likeness.engine_class]


def _head(more: Mapping[str, Any]) -> CallHead:
    try:
        return CallHead(**more["call"])
    except (KeyError, TypeError):
        raise BadSegment("is not the first of its call: send every token of one call, in order") from None
