"""Incremental detokenization of one running sequence. The text is exactly the text that vLLM's own front end produces.

The text of a token depends on the tokens around it (token_stream.py). Two rules follow vLLM:

- Stop strings are searched for in the text of each step. The stop string that ends first wins, and the text ends before
  that stop string. Tokens after the token that completes the stop string do not count. The first `min_tokens` tokens
  are not searched.
- The last max(len(stop)) - 1 characters, which may begin a stop string, are held back until the text ends.

A stop token that ends a sequence (EOS included) counts as a token, but has no text.

Some tokenizers have a decoder that only joins bytes (byte-level BPE: LLaMA 3, Qwen, Falcon, GPT). With such a
tokenizer, a token of whole characters always has the same text, unless it comes in the middle of a character. A table
(WholeTexts) gives the text of such a token ten times faster than a stream (token_stream.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

from cluster.gateway.text.token_stream import REPLACEMENT, TokenStream, UnseenTokens


class TextSource(Protocol):
    """The source of a sequence's text: a Detokenizer, or guards wrapped around a Detokenizer."""

    token_ids: list[int]

    @property
    def searches_text(self) -> bool:
        """Whether stop strings or guards search the text, so that every token must go through `push`."""

    @property
    def refused(self) -> bool:
        """Whether a guard has ended the text."""

    @property
    def pending_chars(self) -> int:
        """Number of characters that `pop_text` has not returned yet."""

    def pending_tokens(self) -> int:
        """Return the number of tokens at the end of the sequence for which `pop_text` has returned no text yet."""

    def push(self, token_ids: Sequence[int], stop_terminated: bool = False) -> str | None:
        """Add the tokens of a step. Returns None while the text continues. If a stop string or a guard has ended the
        text, returns the stop string or GUARD; `push` must not be called after that."""

    def text_of(self, token_id: int) -> str:
        """Add one token and return its text; `pop_text` does not return this text again. Must not be called while
        `searches_text` is True."""

    def push_back(self, text: str) -> None:
        """Take back the text that `text_of` returned last, because it could not be sent. `pop_text` then returns the
        text."""

    def pop_text(self, finished: bool) -> str:
        """Return the text since the last call of `pop_text`. `finished`: whether the text has ended."""

    def restore(self, token_ids: Sequence[int], chars: int) -> None:
        """Begin in the state that another source had after it processed `token_ids` and returned `chars` characters.

        Raises ValueError if that is impossible.
        """


class WholeTexts(dict[int, str | None]):
    """Table from token ids to texts, for a byte-level tokenizer. The entry of a token that does not consist of complete
    characters is None. Each entry is computed when the token is first looked up."""

    def __init__(self, tokenizer: Tokenizer, unsafe_ids: Collection[int]) -> None:
        """Create an empty table. Its entry for a token in `unsafe_ids` is always None. These are the added tokens: a
        detokenizer may skip them, and they do not stand for bytes."""
        super().__init__()
        self._tokenizer = tokenizer
        self._unsafe_ids = unsafe_ids

    def __missing__(self, token_id: int) -> str | None:
        text = self[token_id] = self._text(token_id)
        return text

    def _text(self, token_id: int) -> str | None:
        if token_id in self._unsafe_ids or self._tokenizer.id_to_token(token_id) is None:
            return None
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text if text and REPLACEMENT not in text else None


def whole_texts(tokenizer: Tokenizer, unsafe_ids: Collection[int]) -> WholeTexts | None:
    """Return a WholeTexts table if the tokenizer's decoder only joins bytes, else None."""
    return WholeTexts(tokenizer, unsafe_ids) if isinstance(tokenizer.decoder, ByteLevel) else None


class Detokenizer:
    """The text of one sequence. `push` adds the tokens of a step, and `pop_text` returns the text that may be
    sent. Neither method blocks.

    `token_ids`: the output tokens. Tokens after a stop string are removed from the list.
    """

    __slots__ = (
        "_held_chars",
        "_lengths",
        "_min_tokens",
        "_part_left",
        "_stop",
        "_stream",
        "_text",
        "_whole",
        "_whole_texts",
        "token_ids",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        *,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        whole_texts: WholeTexts | None = None,
        unseen: UnseenTokens | None = None,
    ) -> None:
        """`prompt_ids`: the last ids of the prompt, after which decoding starts (see `priming_ids`). `stop`: stop
        strings, none of them empty. `whole_texts`: table of the tokens whose texts can be used without decoding; None
        to decode all. `unseen`: table of the tokens without text, made for this tokenizer and `skip_special_tokens`;
        None for a new table."""
        if any(not text for text in stop):
            raise ValueError("stop: an empty string would stop every call: leave it out")
        self.token_ids: list[int] = []
        if unseen is None:
            unseen = UnseenTokens(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stream = TokenStream(tokenizer, prompt_ids, unseen, skip_special_tokens=skip_special_tokens)
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._held_chars = max(map(len, stop)) - 1 if stop else 0
        self._whole_texts = None if stop else whole_texts
        self._whole = False
        # Only with stop strings: the text length of each token for which `pop_text` has returned no text yet, and the
        # number of characters that are still to be returned for the token before, whose text was returned in part.
        self._lengths: deque[int] = deque()
        self._part_left = 0
        # Text that `pop_text` has not returned yet. A stop string can only begin in this text, as enough is held back.
        self._text = ""

    def push(self, token_ids: Sequence[int], stop_terminated: bool = False) -> str | None:
        """Add the tokens of a step. Returns the stop string that the text of the tokens completes, or None. Must not be
        called after a stop string.

        `stop_terminated`: whether the last token is the stop token that ended the sequence.
        """
        if self._stop:
            return self._push_watching(token_ids, stop_terminated)
        for token_id in token_ids[:-1] if stop_terminated else token_ids:
            self._text += self.text_of(token_id)
        if stop_terminated:
            self.token_ids += token_ids[-1:]
        return None

    def text_of(self, token_id: int) -> str:
        """Add one token and return its text. `pop_text` does not return this text again. The token must not be a stop
        token, and there must be no stop strings."""
        if self._whole:
            text = self._whole_texts[token_id]  # type: ignore[index]
            if text is not None:
                self.token_ids.append(token_id)
                return text
            self._stream.restart(self.token_ids[-1:])
        self.token_ids.append(token_id)
        text = self._stream.decode(token_id)
        # If there is text, no character is incomplete. After a token of complete characters the table is used. The
        # stream does not see the tokens that the table handles, so it is later restarted after the last of them.
        self._whole = bool(text) and self._whole_texts is not None and self._whole_texts[token_id] is not None
        return text

    @property
    def pending_chars(self) -> int:
        """Number of characters that `pop_text` has not returned yet."""
        return len(self._text)

    def pending_tokens(self) -> int:
        """Return the number of last tokens whose text `pop_text` has not returned yet. Without stop strings this number
        is not kept, so it is computed here by decoding the last tokens."""
        if self._stop:
            return len(self._lengths)
        if not self._text:
            return 0

        def chars(tokens: int) -> int:
            return len(self._stream.text_of(self.token_ids[-tokens:]))

        return bisect_left(range(len(self.token_ids)), len(self._text), lo=1, key=chars) if self.token_ids else 0

    @property
    def searches_text(self) -> bool:
        """Whether there are stop strings to search for."""
        return bool(self._stop)

    @property
    def refused(self) -> bool:
        """Whether a guard has ended the text. Always False, since a Detokenizer has no guards."""
        return False

    def push_back(self, text: str) -> None:
        """Take back the text that `text_of` returned last, because it could not be sent. `pop_text` then returns the
        text."""
        self._text += text

    def restore(self, token_ids: Sequence[int], chars: int) -> None:
        """Begin in the state that another Detokenizer had after it processed `token_ids` and returned `chars`
        characters.

        Must be called before any `push`. Raises ValueError if the text of the tokens has fewer than `chars` characters.
        """
        step = self._stream.decode if self._stop else self.text_of
        text = "".join([step(token_id) for token_id in token_ids])
        if len(text) < chars:
            raise ValueError(f"{len(token_ids)} tokens have {len(text)} characters, not {chars}")
        if self._stop:
            self.token_ids += token_ids
            self._part_left = len(text) - chars
        self._text = text[chars:]

    def pop_text(self, finished: bool) -> str:
        """Return the text since the last call of `pop_text`. While `finished` is False, the last characters are held
        back, since they may begin a stop string."""
        text = self._text
        if finished or not self._held_chars:
            self._text = ""
            self._lengths.clear()
            self._part_left = 0
            return text
        self._text = text[-self._held_chars :]
        taken = text[: -self._held_chars]
        left = len(taken) - self._part_left
        while left > 0:
            left -= self._lengths.popleft()
        self._part_left = -left
        return taken

    def __repr__(self) -> str:
        return f"Detokenizer({len(self.token_ids)} tokens, {len(self._text)} characters not taken)"

    def _push_watching(self, token_ids: Sequence[int], stop_terminated: bool) -> str | None:
        """Do the work of `push` if there are stop strings: decode the step, then find the stop string that ends
        first."""
        before = len(self.token_ids)
        pieces = [self._stream.decode(token_id) for token_id in (token_ids[:-1] if stop_terminated else token_ids)]
        if stop_terminated and token_ids:
            pieces.append("")
        ends = list(accumulate(map(len, pieces), initial=len(self._text)))  # the end of each new token's text
        self._text += "".join(pieces)
        self._lengths.extend(map(len, pieces))
        self.token_ids += token_ids
        if len(self.token_ids) <= self._min_tokens:
            return None
        new_chars = ends[-1] - ends[max(self._min_tokens - before, 0)]
        match = self._first_stop(new_chars)
        if match is None:
            return None
        stop, start = match
        kept = bisect_left(ends, start + len(stop))  # the token that completes the stop string is the last
        del self.token_ids[before + kept :]
        for _ in range(len(pieces) - kept):
            self._lengths.pop()
        self._text = self._text[:start]
        return stop

    def _first_stop(self, new_chars: int) -> tuple[str, int] | None:
        """Return the stop string that ends first within the last `new_chars` characters, and its start in the text;
        None if no stop string ends there."""
        if not new_chars:
            return None
        hits = [(self._text.find(stop, 1 - new_chars - len(stop)), stop) for stop in self._stop]
        ends = [(start + len(stop), order) for order, (start, stop) in enumerate(hits) if start >= 0]
        if not ends:
            return None
        start, stop = hits[min(ends)[1]]
        return stop, start
