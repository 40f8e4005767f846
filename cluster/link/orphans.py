"""Requests whose gateway is gone: they run on for a moment, so that whoever resumes their stream finds them running.

Problem: with a gateway all its streams come back at once through another one, each to be computed from its KV blocks in
steps of which every one is the longer for it, though nothing was ever wrong with the engine that runs them. So a
request of which the gateway says under which name it may come back (`Submit.stream`) is not aborted with its link; what
it generates meanwhile is kept, and a Submit under the same name that goes on from where it has been takes it over.
One that has ended is kept as long, for its end may have been on its way when the gateway was lost.
Invariants: nobody but a later Submit under its name is ever shown its tokens; one that has more tokens than it, or
others, gets nothing; each is given once, or dropped after KEEP_S; it holds its place against calls that begin, never
against such as go on.

Pure: no clock, no I/O; `now` is monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from cluster.api.types import TokenOutput

KEEP_S = 1.0
"""Its client has noticed by then that the connection broke, asked another gateway, and come back here."""


@dataclass(slots=True)
class Orphan:
    """One request of the engine that nobody waits for, or that has ended."""

    request_id: str
    prompt_tokens: int
    token_ids: list[int]
    """All after the prompt, wherever they were generated."""
    until: float = 0.0
    last: TokenOutput | None = None
    """With what it ended, when it has."""

    @property
    def tokens(self) -> int:
        """What it holds in the KV cache."""
        return self.prompt_tokens + len(self.token_ids)


@dataclass(slots=True)
class Orphans:
    """Of one worker, the oldest first; `now` never goes back."""

    _named: dict[str, Orphan] = field(default_factory=dict)
    _running: dict[str, Orphan] = field(default_factory=dict)

    def __len__(self) -> int:
        """Of those, how many hold a place in the engine."""
        return len(self._running)

    @property
    def tokens(self) -> int:
        """Of those in the KV cache."""
        return sum(orphan.tokens for orphan in self._running.values())

    def leave(self, stream: str, orphan: Orphan, now: float) -> str:
        """Its gateway is gone, or it has ended. A name that another has is given to the newer; the engine's id of the
        older, or "" where none runs."""
        doomed = self._drop(stream)
        orphan.until = now + KEEP_S
        self._named[stream] = orphan
        if orphan.last is None:
            self._running[orphan.request_id] = orphan
        return doomed

    def output(self, output: TokenOutput) -> None:
        """A step's tokens of a request that nobody waits for; of one that is none of these they are nobody's."""
        if (orphan := self._running.get(output.request_id)) is None:
            return
        orphan.token_ids += output.token_ids
        if output.finish is not None:
            orphan.last = output
            del self._running[output.request_id]

    def claim(self, stream: str, prompt_tokens: int, emitted: Sequence[int]) -> Orphan | None:
        """What a Submit goes on with, if it is here and has come so far at least; it is an orphan no more."""
        orphan = self._named.get(stream)
        if orphan is None or orphan.prompt_tokens != prompt_tokens or orphan.token_ids[: len(emitted)] != list(emitted):
            return None
        del self._named[stream]
        self._running.pop(orphan.request_id, None)
        return orphan

    def expired(self, now: float) -> list[str]:
        """Drop those that nobody has asked for in time; the engine's ids of such as still run."""
        late = [stream for stream, _ in takewhile(lambda one: one[1].until <= now, self._named.items())]
        return [request_id for stream in late if (request_id := self._drop(stream))]

    def make_room(self, sequences: int, tokens: int) -> list[str]:
        """A call goes on that is none of these, and lacks so much: drop the oldest; their ids in the engine."""
        out = []
        for stream, orphan in [one for one in self._named.items() if one[1].last is None]:
            if sequences <= 0 and tokens <= 0:
                break
            sequences, tokens = sequences - 1, tokens - orphan.tokens
            out.append(self._drop(stream))
        return out

    def _drop(self, stream: str) -> str:
        orphan = self._named.pop(stream, None)
        if orphan is None or self._running.pop(orphan.request_id, None) is None:
            return ""
        return orphan.request_id
