"""A sequence's text filtered by its tenant's output guards, with the interface of the detokenizer.

Stop strings apply first: the guards see the text that would be delivered. Guards and stop strings each hold back text.
A token is returned with its text: before that it is neither billed nor reported in log probabilities, and a token that
a redaction touched is never reported. The state lives as long as the sequence, across workers.
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
    """A detokenizer followed by guards."""

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
        "reportable",
        "token_ids",
    )

    def __init__(self, inner: Detokenizer, chain: GuardChain) -> None:
        self._inner = inner
        self._chain = chain
        self.token_ids = inner.token_ids
        self.reportable: deque[bool] | None = None
        """Whether the log probability of each returned token, in order, may be reported; None if none is requested."""
        self._ready = ""  # decided and not taken
        self._seen = 0  # characters that tokens have added
        self._fed = 0  # of these, characters fed to the guards
        self._open: list[int] = []  # tokens without a character so far
        self._marks: list[GuardMark] = []  # of tokens whose characters are not fed to the guards yet
        self._out = 0  # tokens whose text is decided
        self._taken = 0  # of these, those whose text has been taken

    @property
    def searches_text(self) -> bool:
        """Whether text must pass through this object; always so."""
        return True

    @property
    def refused(self) -> bool:
        """Whether a guard has ended the text."""
        return self._chain.refused

    @property
    def pending_chars(self) -> int:
        """Characters that have not been taken."""
        held = 0 if self._chain.done else self._inner.pending_chars + self._chain.held
        return held + len(self._ready)

    def pending_tokens(self) -> int:
        """The number of last tokens whose text has not been taken whole."""
        return len(self.token_ids) - self._taken

    def push(self, token_ids: Sequence[int], stop_terminated: bool = False) -> str | None:
        """Add tokens, as Detokenizer.push; a guard's refusal ends the text as a stop string does."""
        if self._chain.done:
            return None
        stop = None
        for at, token_id in enumerate(token_ids):
            ends = stop_terminated and at == len(token_ids) - 1
            stop = self._inner.push((token_id,), ends)
            self._mark(ends or stop is not None)
            if stop is not None:
                break
        self._filter(self._inner.pop_text(stop is not None), False)
        return GUARD if self.refused else stop

    def text_of(self, token_id: int) -> str:
        """Add one token and return the decided text."""
        self.push((token_id,))
        return self.pop_text(False)

    def push_back(self, text: str) -> None:
        """Take back the text that `text_of` returned last and that could not be sent; `take` returns it."""
        self._ready = text + self._ready

    def pop_text(self, finished: bool) -> str:
        """The decided text since the last take; all text if `finished`."""
        if finished and not self._chain.done:
            self._marks += [GuardMark(self._seen, self._seen, token, True) for token in self._open]
            self._open = []
            self._filter(self._inner.pop_text(True), True)
        text, self._ready = self._ready, ""
        self._taken = self._out
        return text

    def restore(self, token_ids: Sequence[int], chars: int) -> None:
        """Raise ValueError: the guards' state cannot be derived from the delivered text."""
        raise ValueError("its tenant's guards hold its text")

    def _mark(self, ends: bool) -> None:
        """Record the characters that the last token added. If it ends the text, all remaining ones are its own."""
        token = len(self.token_ids) - 1
        seen = self._fed + self._inner.pending_chars
        if seen > self._seen or ends:
            start = min(self._seen, seen)
            # New characters may belong to any token since the last text. Tokens that never added any are hidden.
            self._marks += [GuardMark(start, seen, earlier, seen == start) for earlier in self._open]
            self._marks.append(GuardMark(start, seen, token))
            self._open, self._seen = [], seen
        else:
            self._open.append(token)

    def _filter(self, text: str, last: bool) -> None:
        marks, self._marks = self._marks, []
        self._fed += len(text)
        out, decided = self._chain.feed(text, marks, last)
        self._ready += out
        self._out += len(decided)
        if self.reportable is not None:
            self.reportable.extend(not mark.hidden for mark in decided)
        if self.refused:
            del self.token_ids[self._out :]

    def __repr__(self) -> str:
        return f"GuardedText({len(self.token_ids)} tokens, {self.pending_chars} characters not taken)"


class GuardedLogprobs:
    """Log probabilities that are held until their tokens' text is decided."""

    def __init__(self, texts: LogprobTexts, text: GuardedText) -> None:
        self._texts = texts
        self._reportable = text.reportable = deque()
        self._waiting: deque[list[TokenLogprob]] = deque()

    def push(self, positions: Iterable[PositionLogprobs]) -> list[TokenLogprob]:
        """Add a step's positions; returns those that may be reported by now."""
        self._waiting += [self._texts.push([position]) for position in positions]
        out: list[TokenLogprob] = []
        while self._reportable and self._waiting:
            reportable, position = self._reportable.popleft(), self._waiting.popleft()
            out += position if reportable else ()
        return out

    def restore(self, token_ids: Sequence[int]) -> None:
        """Raise ValueError, as GuardedText.restore."""
        raise ValueError("its tenant's guards hold its text")
