"""Pieces of a sequence's output. A piece is the output that is new since the API fetched the last piece: text, parts,
log probabilities and the end.

A piece is popped when the client can read. A slow client therefore gets the text of several tokens in one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.api.output_parts import OutputPart
from cluster.gateway.text.detokenizer import TextSource
from cluster.gateway.text.logprobs import LogprobSource, TokenLogprob
from cluster.gateway.text.parsed_text import ParsedText


@dataclass(slots=True)
class Piece:
    """New text, log probabilities and finish reason of one sequence since the sequence's last piece."""

    index: int
    text: str
    finish_reason: str = ""
    logprobs: Sequence[TokenLogprob] = ()
    first: bool = False
    parts: Sequence[OutputPart] = ()
    """The parts since the last piece, in order, if the worker parses the output. `text` is then the joined content."""
    stop_string: str = ""
    """The stop string that has ended the sequence, set with `finish_reason`; "" if none has."""

    @property
    def chars(self) -> int:
        """Number of characters in the piece, over all of its parts."""
        return sum(len(part.text) for part in self.parts) if self.parts else len(self.text)


class PieceBuffer:
    """Buffer of one sequence's output that the API has not fetched yet: the sequence's next piece. `index`: index of
    the sequence in its call. `parsed_text`: the same object as `text` if the worker may parse the output, else None."""

    __slots__ = (
        "_finish_reason",
        "_has_popped",
        "_index",
        "_logprob_texts",
        "_parsed_text",
        "_stop_string",
        "_text",
        "_token_ids",
        "end_popped",
        "logprobs",
        "more_text",
    )

    def __init__(
        self, index: int, text: TextSource, logprob_texts: LogprobSource | None, parsed_text: ParsedText | None
    ) -> None:
        self._index = index
        self._text = text
        self._token_ids = text.token_ids
        self._logprob_texts = logprob_texts
        self._parsed_text = parsed_text
        self.logprobs: list[TokenLogprob] = []
        """New log probabilities, which the sequence adds."""
        self._finish_reason = ""
        self._stop_string = ""
        self._has_popped = False
        self.more_text = False
        """Whether a piece has been popped and the output has not ended, so that the next output may be only text."""
        self.end_popped = False
        """Whether the last piece has been popped, so that nothing more follows."""

    # ---- from the sequence

    def restore(self, token_ids: Sequence[int], chars: int, is_finished: bool) -> None:
        """Continue an output that another gateway has begun. `token_ids`: the tokens so far. `chars`: number of
        characters of their text that the other gateway has delivered. `is_finished`: whether it has delivered the end
        of the output. Raises ValueError if the text is shorter than `chars`, or if the output has guards."""
        self._text.restore(token_ids, chars)
        if self._logprob_texts is not None:
            self._logprob_texts.restore(token_ids)
        self._has_popped = self.more_text = bool(token_ids)
        self.end_popped = is_finished

    def finish(self, reason: str, stop_string: str) -> None:
        """End the output. A second call replaces the finish reason and the stop string."""
        self._finish_reason, self._stop_string = reason, stop_string
        self.more_text = False

    # ---- to the API

    def pop(self) -> Piece | None:
        """Return what is new since the last piece; None if nothing is new."""
        if self.end_popped:
            return None
        reason = self._finish_reason
        text = self._text.pop_text(bool(reason))
        if reason:
            if self._text.refused:  # a guard refused text that was held back to the end
                reason = "content_filter"
            if self._logprob_texts is not None:
                self.logprobs += self._logprob_texts.push(())
        parts = () if self._parsed_text is None else self._parsed_text.pop_parts()
        logprobs = self.logprobs
        if not (text or reason or logprobs or parts):
            return None
        piece = Piece(self._index, text, reason, logprobs, not self._has_popped, parts)
        if logprobs:
            self.logprobs = []
        if reason:
            self.end_popped, piece.stop_string = True, self._stop_string
        elif not self.more_text:
            self._has_popped = self.more_text = True
        return piece

    def pop_text(self) -> str | None:
        """Return the text since the last piece. If there is more to deliver than text, returns None; then `pop` must be
        called."""
        if not self.more_text or self.logprobs:
            return None
        if self._parsed_text is not None and self._parsed_text.has_parts:
            return None
        return self._text.pop_text(False)

    @property
    def pending_chars(self) -> int:
        """Upper bound on the number of characters that wait for `pop`."""
        return self._text.pending_chars

    @property
    def delivered(self) -> int:
        """Number of tokens whose text was delivered to the caller, wholly or in part."""
        return len(self._token_ids) - (0 if self.end_popped else self._text.pending_tokens())

    @property
    def shown(self) -> int:
        """Number of tokens for which the caller has received text or a log probability."""
        if self.end_popped or self._logprob_texts is not None:
            return len(self._token_ids)
        return len(self._token_ids) - self._text.pending_tokens()
