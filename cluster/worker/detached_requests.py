"""Requests whose gateway is gone: they run on for a moment, so that whoever resumes their stream finds them running.

Problem: with a gateway all its streams come back at once through another one, each to be computed from its KV blocks in
steps of which every one is the longer for it, though nothing was ever wrong with the engine that runs them. So a
request of which the gateway says under which name it may come back (`Submit.stream`) is not aborted with its link; what
it generates meanwhile is kept, and a Submit under the same name that goes on from where it has been takes it over.
One that has ended is kept as long, for its end may have been on its way when the gateway was lost.
Invariants: nobody but a later Submit under its name is ever shown its tokens; one that asks for something else, has
more tokens than it or others, gets nothing; each is given once, or dropped after KEEP_S; it holds its place against
calls that begin, never against such as go on.

Pure: no clock, no I/O; `now` is monotonic seconds, and never goes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from cluster.api.types import FinishReason, TokenOutput

KEEP_S = 1.0
"""Its client has noticed by then that the connection broke, asked another gateway, and come back here."""
BROKEN = (FinishReason.ERROR, FinishReason.ABORT)


@dataclass(slots=True)
class DetachedRequest:
    """One request of the engine that nobody waits for, or that has ended."""

    stream: str
    request_id: str
    asked: object
    """What besides its prompt its tokens depend on."""
    prompt_tokens: int
    token_ids: list[int]
    """All after the prompt, wherever they were generated."""
    cached_tokens: int = 0
    """Of its prompt, when it began here."""
    last: TokenOutput | None = None
    """With what it ended, when it has."""
    until: float = 0.0

    @property
    def tokens(self) -> int:
        """What it holds in the KV cache."""
        return self.prompt_tokens + len(self.token_ids)


@dataclass(slots=True)
class DetachedRequests:
    """Of one worker, the oldest first. Engine ids that these methods return are of such as still run there and are to
    be aborted."""

    _named: dict[str, DetachedRequest] = field(default_factory=dict)
    _running: dict[str, DetachedRequest] = field(default_factory=dict)

    def __len__(self) -> int:
        """How many hold a place in the engine."""
        return len(self._running)

    @property
    def tokens(self) -> int:
        """Of those in the KV cache."""
        return sum(orphan.tokens for orphan in self._running.values())

    def leave(self, orphan: DetachedRequest, now: float) -> list[str]:
        """Its gateway is gone, or it has ended. Another of its name is dropped."""
        older = self.drop(orphan.stream)
        orphan.until = now + KEEP_S
        self._named[orphan.stream] = orphan
        if orphan.last is None:
            self._running[orphan.request_id] = orphan
        return older

    def output(self, output: TokenOutput) -> int:
        """A step's tokens of a request that no call has; how many they are, 0 where it is none of these. One that the
        engine could not go on with is of no use to anybody."""
        orphan = self._running.get(output.request_id)
        if orphan is None:
            return 0
        orphan.token_ids += output.token_ids
        if output.finish is not None:
            orphan.last = output
            del self._running[output.request_id]
            if output.finish in BROKEN:
                del self._named[orphan.stream]
        return len(output.token_ids)

    def claim(self, stream: str, asked: object, prompt_tokens: int, emitted: Sequence[int]) -> DetachedRequest | None:
        """What a Submit goes on with, if it is here and has come so far at least; it is an orphan no more."""
        orphan = self._named.get(stream)
        if orphan is None or (orphan.asked, orphan.prompt_tokens) != (asked, prompt_tokens):
            return None
        if orphan.token_ids[: len(emitted)] != list(emitted):
            return None
        self.drop(stream)
        return orphan

    def expired(self, now: float) -> list[str]:
        """Drop those that nobody has asked for in time."""
        late = [stream for stream, _ in takewhile(lambda one: one[1].until <= now, self._named.items())]
        return [request_id for stream in late for request_id in self.drop(stream)]

    def make_room(self, sequences: int, tokens: int) -> list[str]:
        """A call has come that is none of these, and lacks so much: drop the oldest."""
        out: list[str] = []
        for orphan in list(self._running.values()):
            if sequences <= 0 and tokens <= 0:
                break
            sequences, tokens = sequences - 1, tokens - orphan.tokens
            out += self.drop(orphan.stream)
        return out

    def drop(self, stream: str) -> list[str]:
        """Nobody is to have it."""
        orphan = self._named.pop(stream, None)
        if orphan is None or self._running.pop(orphan.request_id, None) is None:
            return []
        return [orphan.request_id]
