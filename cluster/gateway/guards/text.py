"""A call's text behind its tenant's output guards: stands where the detokenizer stands, and is asked the same.

Stop strings come first: the guards see the text that would be delivered. What guards hold back adds to what stop
strings hold back. Tokens come out with their text: until then they are neither told in log probabilities nor billed,
and one that a redaction has touched is never told. The state lives as long as the output, whichever worker it is on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from cluster.api.types import PositionLogprobs
from cluster.gateway.guards.stream import GuardChain, GuardMark
from cluster.gateway.text.detokenizer import Detokenizer
from cluster.gateway.text.logprobs import LogprobTexts, TokenLogprob

GUARD = "guard"


class GuardedText:
    """A detokenizer and the guards behind it."""

    __slots__ = (
        "_chain",
        "_fed",
        "_inner",
        "_marks",
        "_open",
        "_out",
        "_ready",
        "_seen",
        "_taken",
        "token_ids",
        "told",
    )

    def __init__(self, inner: Detokenizer, chain: GuardChain) -> None:
        self._inner = inner
        self._chain = chain
        self.token_ids = inner.token_ids
        self.told: deque[bool] | None = None
        """Of each next token that has come out, whether it may be told of; for who tells, where somebody does."""
        self._ready = ""  # decided, not taken
        self._seen = 0  # characters that tokens have brought
        self._fed = 0  # of these, characters given to the guards
        self._open: list[int] = []  # tokens that have brought no character yet
        self._marks: list[GuardMark] = []  # of tokens whose characters the guards have not got
        self._out = 0  # tokens that have come out
        self._taken = 0  # of these, those whose text has been taken

    @property
    def watches(self) -> bool:
        """Nothing goes past it."""
        return True

    @property
    def refused(self) -> bool:
        """Whether a guard has ended the text."""
        return self._chain.refused

    @property
    def untaken(self) -> int:
        """Characters that have not been taken."""
        held = 0 if self._chain.done else self._inner.untaken + self._chain.held
        return held + len(self._ready)

    def untaken_tokens(self) -> int:
        """How many of the last tokens have no text that was taken; one taken in part is one of them."""
        return len(self.token_ids) - self._taken

    def push(self, token_ids: Sequence[int], stop_terminated: bool = False) -> str | None:
        """As Detokenizer.push; a guard's refusal ends the text as a stop string does."""
        if self._chain.done:
            return None
        stop = None
        for at, token_id in enumerate(token_ids):
            ends = stop_terminated and at == len(token_ids) - 1
            stop = self._inner.push((token_id,), ends)
            self._mark(ends or stop is not None)
            if stop is not None:
                break
        self._flow(self._inner.take(stop is not None), False)
        return GUARD if self.refused else stop

    def text_of(self, token_id: int) -> str:
        """Add one token and hand out what is decided."""
        self.push((token_id,))
        return self.take(False)

    def give_back(self, text: str) -> None:
        """What `text_of` handed out last could not be sent: keep it for `take`."""
        self._ready = text + self._ready

    def take(self, finished: bool) -> str:
        """The text since the last take, as far as it is decided; all of it when `finished`."""
        if finished and not self._chain.done:
            self._marks += [GuardMark(self._seen, self._seen, token, True) for token in self._open]
            self._open = []
            self._flow(self._inner.take(True), True)
        text, self._ready = self._ready, ""
        self._taken = self._out
        return text

    def restore(self, token_ids: Sequence[int], chars: int) -> None:
        """What guards have held back, and whether they decided in time, is not in what was delivered."""
        raise ValueError("its tenant's guards hold its text")

    def _mark(self, ends: bool) -> None:
        """Note what the last token has brought. One that ends the text has brought what is there, if anything."""
        token = len(self.token_ids) - 1
        seen = self._fed + self._inner.untaken
        if seen > self._seen or ends:
            start = min(self._seen, seen)
            # Characters may be of all the tokens since the last text. Of those that never got any nothing is told.
            self._marks += [GuardMark(start, seen, one, seen == start) for one in self._open]
            self._marks.append(GuardMark(start, seen, token))
            self._open, self._seen = [], seen
        else:
            self._open.append(token)

    def _flow(self, text: str, last: bool) -> None:
        marks, self._marks = self._marks, []
        self._fed += len(text)
        out, decided = self._chain.feed(text, marks, last)
        self._ready += out
        self._out += len(decided)
        if self.told is not None:
            self.told.extend(not mark.hidden for mark in decided)
        if self.refused:
            del self.token_ids[self._out :]

    def __repr__(self) -> str:
        return f"GuardedText({len(self.token_ids)} tokens, {self.untaken} characters not taken)"


class GuardedLogprobs:
    """Log probabilities that wait for their tokens' text to be decided."""

    def __init__(self, texts: LogprobTexts, text: GuardedText) -> None:
        self._texts = texts
        self._told = text.told = deque()
        self._waiting: deque[list[TokenLogprob]] = deque()

    def push(self, positions: Iterable[PositionLogprobs]) -> list[TokenLogprob]:
        """Add a step's positions; what may be told by now comes out."""
        self._waiting += [self._texts.push([position]) for position in positions]
        out: list[TokenLogprob] = []
        while self._told and self._waiting:
            may, position = self._told.popleft(), self._waiting.popleft()
            out += position if may else ()
        return out

    def restore(self, token_ids: Sequence[int]) -> None:
        """As of the text."""
        raise ValueError("its tenant's guards hold its text")
