"""Calls for the fault tests, of every kind. The chunks that each call received are recorded and compared with the
undisturbed answer."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from cluster.v1 import inference_pb2 as pb
from loadtests.faces.grpc_stream import CHAT, OPTIONS

CHANNELS = 8
CALL_S = 120.0
HIT_S = 0.1
LAST_CHARACTERS = 8
_WORDS = ("river", "stone", "lantern", "orchard", "copper", "velvet", "harbour", "meadow", "thunder", "willow", "amber")

KINDS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.9, "seed": 7, "top_p": 0.95},
    "n": {"temperature": 0.8, "seed": 11, "n": 3},
    "stop": {"temperature": 0.0, "stop": ["qu", "zz", "ent", "!?"]},
    "grammar": {"temperature": 0.0, "response_format": pb.ResponseFormat(type="regex", regex="[a-z ]+")},
    "logprobs": {"temperature": 0.0, "logprobs": True, "top_logprobs": 2},
    "penalties": {"temperature": 0.7, "seed": 3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
    "all": {"temperature": 0.6, "seed": 5, "n": 2, "logprobs": True, "repetition_penalty": 1.1, "stop": ["zqx"]},
}
"""Request fields beyond the prompt and the length, by kind of request."""


_Tokens = Mapping[int, Sequence[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class FaultRequest:
    """A request for the load tests of faults. `key` identifies the request. `kind` is the name of its kind, for example
    "greedy"."""

    key: str
    kind: str
    message: pb.ChatRequest


def mixed(count: int, model: str, seed: int, *, tokens: tuple[int, int], words: tuple[int, int]) -> list[FaultRequest]:
    """Return `count` requests of all kinds in turn, each with a different prompt and length."""
    rng = random.Random(seed)
    out = []
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        out.append(
            make_request(f"{seed}-{number}", kind, model, rng.randint(*tokens), rng.randint(*words), rng.random())
        )
    return out


def make_request(
    key: str, kind: str, model: str, tokens: int, words: int, seed: float, fields: Mapping[str, Any] | None = None
) -> FaultRequest:
    """Return a chat request. Its prompt is `key` and `words` random words. The answer has `tokens` tokens, unless
    a stop string ends it.

    `kind`: name of the kind of request. `fields`: further fields of the request; None: the fields of `kind` in
    KINDS. `seed`: seed of the random words.
    """
    rng = random.Random(f"{key} {seed}")
    prompt = f"{key} " + " ".join(rng.choice(_WORDS) for _ in range(words))
    given = {"ignore_eos": True, **(KINDS[kind] if fields is None else fields)}
    message = pb.ChatRequest(
        model=model, messages=[pb.Message(role="user", content=prompt)], max_tokens=tokens, **given
    )
    return FaultRequest(key, kind, message)


@dataclass(slots=True)
class CallResult:
    """Record of everything that the server sent for a call. Times are wall-clock times."""

    request: FaultRequest
    request_id: str
    sent: float
    answer_id: str = ""
    """Id of the answer, from the chunks."""
    ended: float = 0.0
    whole: int = 0
    """Number of characters of the undisturbed answer, if known."""
    texts: dict[int, str] = field(default_factory=dict)
    finishes: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    """Token ids with their log probabilities, by index of the output, if the server sends them."""
    chunks: list[float] = field(default_factory=list)
    """Arrival time of each chunk with text or tokens."""
    offsets: list[int] = field(default_factory=list)
    usage: pb.Usage | None = None
    error: str = ""
    silence_s: float = 0.0
    """The longest gap between two chunks, in seconds."""

    def record(self, chunk: pb.ChatChunk, now: float) -> None:
        """Record a received chunk."""
        self.answer_id = chunk.id
        if chunk.choices:
            self.offsets.append(chunk.offset)  # progress-only chunks repeat it
            if self.chunks:
                self.silence_s = max(self.silence_s, now - self.chunks[-1])
            self.chunks.append(now)
        for choice in chunk.choices:
            index = choice.index
            self.texts[index] = self.texts.get(index, "") + choice.delta.content
            if choice.finish_reason:
                self.finishes[index] = choice.finish_reason
            if choice.logprobs:
                self.tokens.setdefault(index, []).extend((token.token_id, token.logprob) for token in choice.logprobs)
        if chunk.HasField("usage"):
            self.usage = chunk.usage

    @property
    def begun(self) -> bool:
        """Whether any part of the answer has arrived."""
        return bool(self.chunks)

    @property
    def resumed(self) -> int:
        """Number of resumes after the first token of the call."""
        return self.usage.resumed if self.usage is not None else 0

    @property
    def last(self) -> bool:
        """Whether at most LAST_CHARACTERS characters (one or two tokens) are missing at the end of the answer. The
        length of the whole answer is taken from the same call without a fault. If that length is unknown, the result is
        False."""
        return self.whole > 0 and sum(map(len, self.texts.values())) >= self.whole - LAST_CHARACTERS

    @property
    def mid_character(self) -> bool:
        """Whether the received text ends within a character. A replacement character at the end shows that."""
        return any(text.endswith("�") for text in self.texts.values())

    @property
    def hit(self) -> bool:
        """Whether the call has been silent for so long that it seems to have lost a worker."""
        return self.silence_s > HIT_S

    def gaps(self) -> list[tuple[float, float]]:
        """Return (time, length) of each silence between two chunks, in seconds."""
        return [(b, b - a) for a, b in zip(self.chunks, self.chunks[1:], strict=False)]


def difference(call: CallResult, undisturbed: CallResult, logprob_tolerance: float = 0.0) -> str:
    """Return how a call differs from its undisturbed answer: "" for no difference, "duplicate", "gap", "other", or
    "failed: " with the error. `logprob_tolerance` is for real engines, whose log probabilities depend a little on the
    rest of the batch."""
    if call.error:
        return f"failed: {call.error}"
    if call.offsets != sorted(set(call.offsets)):
        return "duplicate"
    for index, text in undisturbed.texts.items():
        mismatch = _texts_differ(call.texts.get(index, ""), text)
        if mismatch:
            return mismatch
    if not _tokens_equal(call.tokens, undisturbed.tokens, logprob_tolerance) or call.finishes != undisturbed.finishes:
        return "other"
    assert call.usage is not None
    assert undisturbed.usage is not None
    counts = [(u.prompt_tokens, u.completion_tokens) for u in (call.usage, undisturbed.usage)]
    return "" if counts[0] == counts[1] and call.texts.keys() == undisturbed.texts.keys() else "other"


def _tokens_equal(ours: _Tokens, whole: _Tokens, tolerance: float) -> bool:
    """Return whether token ids are equal and log probabilities are equal within the tolerance."""
    if ours.keys() != whole.keys():
        return False
    for index, wanted in whole.items():
        actual = ours[index]
        if [token for token, _ in actual] != [token for token, _ in wanted]:
            return False
        if any(abs(a - b) > tolerance for (_, a), (_, b) in zip(actual, wanted, strict=True)):
            return False
    return True


SEEN = 12
"""Number of characters of each text, from the first difference on, that are searched for in the other text. If they are
found, the difference is a duplicate or a gap; otherwise it is `other`.
"""


def _texts_differ(ours: str, whole: str) -> str:
    if ours == whole:
        return ""
    at = next((i for i, (a, b) in enumerate(zip(ours, whole, strict=False)) if a != b), min(len(ours), len(whole)))
    rest, missing = ours[at : at + SEEN], whole[at : at + SEEN]
    if missing and missing in ours[at:]:
        return "duplicate"
    if not rest or rest in whole[at:]:
        return "gap"
    return "other"


class Caller:
    """Client that makes calls over a few connections and records every chunk."""

    def __init__(self, address: str, metadata: Sequence[tuple[str, str]], run: str) -> None:
        """Open the connections. `run`: beginning of every request id, which identifies the run's rows in the ledger."""
        self._metadata = tuple(metadata)
        self._run = run
        self._channels = [grpc.aio.insecure_channel(address, options=OPTIONS) for _ in range(CHANNELS)]
        self._methods = [
            c.unary_stream(
                CHAT, request_serializer=pb.ChatRequest.SerializeToString, response_deserializer=pb.ChatChunk.FromString
            )
            for c in self._channels
        ]
        self._made = 0

    async def call(
        self, request: FaultRequest, on_chunk: Callable[[CallResult], None] = lambda result: None, whole: int = 0
    ) -> CallResult:
        """Make one call and read its stream to the end. If the server fails, no exception is raised; `error` of the
        result describes the failure. `whole`: number of characters of the undisturbed answer, 0 if unknown."""
        self._made += 1
        result = CallResult(request, f"{self._run}-{self._made}", time.time(), whole=whole)
        metadata = (*self._metadata, ("x-request-id", result.request_id))
        call = self._methods[self._made % CHANNELS](request.message, metadata=metadata, timeout=CALL_S)
        try:
            on_chunk(result)
            async for chunk in call:
                result.record(chunk, time.time())
                on_chunk(result)
        except grpc.aio.AioRpcError as error:
            result.error = f"{error.code().name}: {error.details()}"
        finally:
            result.ended = time.time()
            call.cancel()
        if not result.error and result.usage is None:
            result.error = "the stream ended without usage"
        return result

    async def close(self) -> None:
        """Close the connections."""
        for channel in self._channels:
            await channel.close()
