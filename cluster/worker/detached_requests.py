"""Detached requests: requests that run on for a moment after their gateway is lost, so that a resumed call can take
them over.

Problem: when a gateway is lost, all its streams are resumed through other gateways at the same time. If the resumed
requests were submitted to the engine again, their prompts would slow down the engine, although the engine never failed.
So when a link ends, its requests with a stream name (`Submit.stream`) run on, and the tokens generated meanwhile are
kept. A Submit with the same stream name takes the request over. Finished requests are kept for the same time, since
their last output may not have reached the client.

Invariants: a Submit takes over a request only if their parameters are equal and the request's tokens begin with the
Submit's emitted tokens. A detached request is taken over at most once, and dropped after DETACHED_S seconds otherwise.
Detached requests may block new requests, but never resumed requests.

Pure: no clock, no I/O. `now` is monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from cluster.api.types import FinishReason, TokenOutput

DETACHED_S = 1.0
"""Seconds for which a detached request is kept: enough for a client to notice the loss and resume the stream."""
FAILED = (FinishReason.ERROR, FinishReason.ABORT)


@dataclass(slots=True)
class DetachedRequest:
    """A request that has lost its link. The request still runs in the engine, or has ended."""

    stream: str
    request_id: str
    parameters: object
    """The parameters that determine the tokens, apart from the prompt."""
    prompt_tokens: int
    token_ids: list[int]
    """All tokens after the prompt, including the tokens that other workers generated before."""
    cached_tokens: int = 0
    """Tokens of the prompt that were cached when the request started here."""
    last: TokenOutput | None = None
    """The last output, once the request has ended."""
    until: float = 0.0

    @property
    def tokens(self) -> int:
        """Number of the request's tokens in the KV cache."""
        return self.prompt_tokens + len(self.token_ids)


@dataclass(slots=True)
class DetachedRequests:
    """The detached requests of one worker, oldest first.

    Several methods return engine request ids: the caller must abort these requests, which still run.
    """

    _by_stream: dict[str, DetachedRequest] = field(default_factory=dict)
    _running: dict[str, DetachedRequest] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of detached requests that still run, and so hold a slot in the engine."""
        return len(self._running)

    @property
    def tokens(self) -> int:
        """Number of KV tokens of the running detached requests."""
        return sum(request.tokens for request in self._running.values())

    def add(self, request: DetachedRequest, now: float) -> list[str]:
        """Add a request that has ended or whose gateway is gone. An older request of the same sequence (with the
        same stream name) is dropped.

        Returns the ids of engine requests that the caller must abort.
        """
        older = self.drop(request.stream)
        request.until = now + DETACHED_S
        self._by_stream[request.stream] = request
        if request.last is None:
            self._running[request.request_id] = request
        return older

    def output(self, output: TokenOutput) -> int:
        """Record one step's output of a detached request; return its number of tokens, or 0 for an unknown request.

        A request that ends in an error or an abort is dropped.
        """
        request = self._running.get(output.request_id)
        if request is None:
            return 0
        request.token_ids += output.token_ids
        if output.finish is not None:
            request.last = output
            del self._running[output.request_id]
            if output.finish in FAILED:
                del self._by_stream[request.stream]
        return len(output.token_ids)

    def claim(
        self, stream: str, parameters: object, prompt_tokens: int, emitted: Sequence[int]
    ) -> DetachedRequest | None:
        """Remove and return the detached request that a Submit may take over; None if there is none.

        The request must have the same stream name, parameters and prompt length, and its tokens must begin with the
        emitted tokens.
        """
        request = self._by_stream.get(stream)
        if request is None or (request.parameters, request.prompt_tokens) != (parameters, prompt_tokens):
            return None
        if request.token_ids[: len(emitted)] != list(emitted):
            return None
        self.drop(stream)
        return request

    def expired(self, now: float) -> list[str]:
        """Drop the requests that were not taken over in time; return the engine request ids to abort."""
        late = [stream for stream, _ in takewhile(lambda item: item[1].until <= now, self._by_stream.items())]
        return [request_id for stream in late for request_id in self.drop(stream)]

    def make_room(self, sequences: int, tokens: int) -> list[str]:
        """Drop the oldest running requests until `sequences` slots and `tokens` KV tokens are freed.

        Returns the engine request ids to abort.
        """
        dropped: list[str] = []
        for request in list(self._running.values()):
            if sequences <= 0 and tokens <= 0:
                break
            sequences, tokens = sequences - 1, tokens - request.tokens
            dropped += self.drop(request.stream)
        return dropped

    def drop(self, stream: str) -> list[str]:
        """Drop the request with this stream name, if there is one; return the engine request ids to abort."""
        request = self._by_stream.pop(stream, None)
        if request is None or self._running.pop(request.request_id, None) is None:
            return []
        return [request.request_id]
