"""The text of a sequence after the tenant's output guards. The interface is that of the detokenizer.

Stop strings apply before the guards, so the guards see the text that would be delivered without guards. Guards and
stop strings each hold back text. A token is billed, and reported in log probabilities, only after its text was
returned. A token whose text was changed by a redaction is never reported in log probabilities. The state lives as
long as the sequence, even when the sequence moves to another worker.
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
    """A detokenizer whose text passes through a chain of guards."""

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
        """For each returned token, in order, whether the log probability may be reported. None if log probabilities are
        not requested."""
        self._ready = ""  # decided text that `pop_text` has not returned yet
        self._seen = 0  # number of characters that tokens have added
        self._fed = 0  # number of characters that were fed to the guards
        self._open: list[int] = []  # tokens that have added no character so far
        self._marks: list[GuardMark] = []  # marks of tokens whose characters are not fed to the guards yet
        self._out = 0  # number of tokens whose text is decided
        self._taken = 0  # number of tokens whose text `pop_text` has returned

    @property
    def searches_text(self) -> bool:
        """Whether every token must go through `push`. Always True, since guards search the text."""
        return True

    @property
    def refused(self) -> bool:
        """Whether a guard has ended the text."""
        return self._chain.refused

    @property
    def pending_chars(self) -> int:
        """Number of characters that `pop_text` has not returned yet, including those that are held back."""
        held = 0 if self._chain.done else self._inner.pending_chars + self._chain.held
        return held + len(self._ready)

    def pending_tokens(self) -> int:
        """Return the number of newest tokens whose text `pop_text` has not returned completely."""
        return len(self.token_ids) - self._taken

    def push(self, token_ids: Sequence[int], stop_terminated: bool = False) -> str | None:
        """Add the tokens of a step. Returns the stop string that ended the text, GUARD if a guard ended the text, else
        None. `stop_terminated`: whether the last token is the stop token that ended the sequence."""
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
        """Add one token. Returns the text that the guards have released since the last call of `pop_text`; "" if the
        guards hold it back."""
        self.push((token_id,))
        return self.pop_text(False)

    def push_back(self, text: str) -> None:
        """Take back the text that `text_of` returned last, because it could not be sent. The next call of `pop_text`
        returns this text again."""
        self._ready = text + self._ready

    def pop_text(self, finished: bool) -> str:
        """Return the text that the guards have released since the last call. `finished`: whether the output has ended;
        the guards then first decide on all text that they hold back."""
        if finished and not self._chain.done:
            self._marks += [GuardMark(self._seen, self._seen, token, True) for token in self._open]
            self._open = []
            self._filter(self._inner.pop_text(True), True)
        text, self._ready = self._ready, ""
        self._taken = self._out
        return text

    def restore(self, token_ids: Sequence[int], chars: int) -> None:
        """Raise ValueError, since the state of the guards cannot be derived from the delivered text."""
        raise ValueError("its tenant's guards hold its text")

    def _mark(self, ends: bool) -> None:
        """Record the characters that the last token added. `ends`: whether the token ends the text; a token that ends
        the text is recorded even if it added no character."""
        token = len(self.token_ids) - 1
        seen = self._fed + self._inner.pending_chars
        if seen > self._seen or ends:
            start = min(self._seen, seen)
            # New characters may belong to any token since the last text. Tokens without any character are hidden.
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
    """Log probabilities of a sequence with guards. A token's log probability is held back until the guards have decided
    whether the token's text may be sent."""

    def __init__(self, texts: LogprobTexts, text: GuardedText) -> None:
        self._texts = texts
        self._reportable = text.reportable = deque()
        self._waiting: deque[list[TokenLogprob]] = deque()

    def push(self, positions: Iterable[PositionLogprobs]) -> list[TokenLogprob]:
        """Add the positions of a step. Returns the log probabilities, of this step and of earlier steps, that may be
        reported by now."""
        self._waiting += [self._texts.push([position]) for position in positions]
        out: list[TokenLogprob] = []
        while self._reportable and self._waiting:
            reportable, position = self._reportable.popleft(), self._waiting.popleft()
            out += position if reportable else ()
        return out

    def restore(self, token_ids: Sequence[int]) -> None:
        """Raise ValueError, as GuardedText.restore does."""
        raise ValueError("its tenant's guards hold its text")
