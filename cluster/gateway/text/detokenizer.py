"""Incremental detokenization of one running call, with exactly the text that vLLM's own front end produces.

Theory. A token's text depends on its neighbours: a character may be split over tokens, and sentencepiece models drop
the first space of a text. So the stream is primed with the prompt and emits only complete text (tokenizers'
DecodeStream). Three rules follow vLLM:

- A decode that contradicts emitted text (invalid bytes after valid ones) restarts the stream, unprimed.
- Stop strings are searched in the text of each step. The one that ends first wins, the text ends before it, and tokens
  after the one that completed it do not count. There is no search within the first `min_tokens` tokens.
- The last max(len(stop)) - 1 characters, which may begin a stop string, are held back until the call ends.

With each token, DecodeStream decodes again all tokens that have no text yet. A call that never completes a character,
or that ends in special tokens only, would cost the square of its length. Two kinds of tokens therefore bypass it:
tokens that no decoder sees (skipped special tokens and ids without a token), which add no text, and an incomplete
character of more than MAX_OPEN_TOKENS tokens, all but the last of which are decoded by themselves.

A stop token that ends a call (EOS included) counts, but has no text.

If a tokenizer's decoder only joins bytes (byte-level BPE: LLaMA 3, Qwen, Falcon, GPT), a token of complete characters
has the same text after every complete character. A table returns it in a tenth of the stream's time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Final, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel, DecodeStream

INVALID_PREFIX: Final = "Invalid prefix encountered"
TAIL_TOKENS: Final = 96
"""How many tokens of a long prompt prime a stream, if that is equivalent to the whole prompt."""
REPLACEMENT: Final = "\ufffd"
MAX_OPEN_TOKENS: Final = 256
"""Tokens without text after which they no longer count as one incomplete character. Each costs decoding all tokens
before it, about 50 us on average."""
KEPT_TOKENS: Final = 16
"""How many of them, the last ones, are kept because they may begin a character."""


class TextSource(Protocol):
    """The interface of a sequence to its text: a Detokenizer, or guards wrapped around one."""

    token_ids: list[int]

    @property
    def searches_text(self) -> bool:
        """Whether stop strings or guards search the text, so that every token must go through `push`."""

    @property
    def refused(self) -> bool:
        """Whether a guard has ended the text."""

    @property
    def pending_chars(self) -> int:
        """Characters that have not been taken."""

    def pending_tokens(self) -> int:
        """Number of tokens at the end none of whose text has been taken."""

    def push(self, token_ids: Sequence[int], stop_terminated: bool = False) -> str | None:
        """Add a step's tokens. Returns what has ended the text, None if nothing has; after an end, do not push."""

    def text_of(self, token_id: int) -> str:
        """Add one token and return its text, which then counts as taken. Not allowed if `watches`."""

    def push_back(self, text: str) -> None:
        """Return the last text of `text_of`, which could not be sent, to be taken later."""

    def pop_text(self, finished: bool) -> str:
        """Return the text since the last take."""

    def restore(self, token_ids: Sequence[int], chars: int) -> None:
        """Start from the state of another source with these tokens and `chars` taken characters.

        Raises ValueError if that is impossible."""


class WholeTexts(dict[int, str | None]):
    """Table of the texts of a byte-level tokenizer's tokens; None for tokens that are not complete characters.

    Filled on first use of each token."""

    def __init__(self, tokenizer: Tokenizer, unsafe_ids: Collection[int]) -> None:
        """`unsafe_ids`: added tokens, which may be skipped and are not bytes."""
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


class UnseenTokens(dict[int, bool]):
    """Table of whether a token is skipped before decoding. Filled on first use of each token."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder() if skip_special_tokens else {}
        self._skipped = frozenset(token_id for token_id, token in added.items() if token.special)

    def __missing__(self, token_id: int) -> bool:
        try:
            unseen = token_id in self._skipped or self._tokenizer.id_to_token(token_id) is None
        except (OverflowError, TypeError):  # not a token id at all
            return True
        self[token_id] = unseen
        return unseen


def whole_texts(tokenizer: Tokenizer, unsafe_ids: Collection[int]) -> WholeTexts | None:
    """A WholeTexts table if the tokenizer's decoder only joins bytes, else None."""
    return WholeTexts(tokenizer, unsafe_ids) if isinstance(tokenizer.decoder, ByteLevel) else None


class Detokenizer:
    """The text of one call. `push` adds a step's tokens, `take` returns the text that may be sent; neither blocks.

    `token_ids`: the output tokens that count; tokens after a stop string are removed from it.
    """

    __slots__ = (
        "_held_chars",
        "_lengths",
        "_min_tokens",
        "_open",
        "_part_left",
        "_skip_special",
        "_stop",
        "_stream",
        "_text",
        "_tokenizer",
        "_unseen",
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
        """`prompt_ids` prime the stream (see `priming_ids`). `stop` strings must not be empty. `unseen`: the table for
        this tokenizer and `skip_special_tokens`; None makes a new one."""
        if any(not text for text in stop):
            raise ValueError("stop: an empty string would stop every call: leave it out")
        self.token_ids: list[int] = []
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=list(prompt_ids), skip_special_tokens=skip_special_tokens)
        self._skip_special = skip_special_tokens
        self._open: list[int] = []
        """Tokens in the stream that have no text yet."""
        self._unseen = UnseenTokens(tokenizer, skip_special_tokens=skip_special_tokens) if unseen is None else unseen
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._held_chars = max(map(len, stop)) - 1 if stop else 0
        self._whole_texts = None if stop else whole_texts
        self._whole = False
        # With stop strings: the text lengths of the tokens of which nothing has been taken, and how many characters of
        # the token before them have not been taken.
        self._lengths: deque[int] = deque()
        self._part_left = 0
        self._text = ""  # not taken yet; a stop string can only begin in here, because enough is held back

    def push(self, token_ids: Sequence[int], stop_terminated: bool = False) -> str | None:
        """Add a step's tokens. Returns the stop string that their text completes, if any; then do not push again.

        `stop_terminated`: the last token is the stop token that ended the call.
        """
        if self._stop:
            return self._push_watching(token_ids, stop_terminated)
        for token_id in token_ids[:-1] if stop_terminated else token_ids:
            self._text += self.text_of(token_id)
        if stop_terminated:
            self.token_ids += token_ids[-1:]
        return None

    def text_of(self, token_id: int) -> str:
        """Add one token, not a stop token, and return its text, which then counts as taken. Not with stop strings."""
        if self._whole:
            text = self._whole_texts[token_id]  # type: ignore[index]
            if text is not None:
                self.token_ids.append(token_id)
                return text
            self._stream = DecodeStream(ids=self.token_ids[-1:], skip_special_tokens=self._skip_special)
        self.token_ids.append(token_id)
        text = self._decode(token_id)
        # Text means that no character is incomplete. After a token of complete characters the table is used; the
        # stream does not see those tokens, so it later restarts after the last of them.
        self._whole = bool(text) and self._whole_texts is not None and self._whole_texts[token_id] is not None
        return text

    @property
    def pending_chars(self) -> int:
        """Characters that have not been taken."""
        return len(self._text)

    def pending_tokens(self) -> int:
        """Number of tokens at the end none of whose text has been taken. Without stop strings, computed on demand."""
        if self._stop:
            return len(self._lengths)
        if not self._text:
            return 0

        def chars(tokens: int) -> int:
            tail = self.token_ids[-tokens:]
            return len(self._tokenizer.decode(tail, skip_special_tokens=self._skip_special))

        return bisect_left(range(len(self.token_ids)), len(self._text), lo=1, key=chars) if self.token_ids else 0

    @property
    def searches_text(self) -> bool:
        """Whether there are stop strings to search for."""
        return bool(self._stop)

    @property
    def refused(self) -> bool:
        """Always False: a Detokenizer has no guards."""
        return False

    def push_back(self, text: str) -> None:
        """Return the last text of `text_of`, which could not be sent, to be taken later."""
        self._text += text

    def restore(self, token_ids: Sequence[int], chars: int) -> None:
        """Start from the state of another Detokenizer with these tokens and `chars` taken characters.

        Call before any `push`. Raises ValueError if the tokens have fewer characters."""
        step = self._decode if self._stop else self.text_of
        text = "".join([step(token_id) for token_id in token_ids])
        if len(text) < chars:
            raise ValueError(f"{len(token_ids)} tokens have {len(text)} characters, not {chars}")
        if self._stop:
            self.token_ids += token_ids
            self._part_left = len(text) - chars
        self._text = text[chars:]

    def pop_text(self, finished: bool) -> str:
        """Return the text since the last take; unless `finished`, without the end that may begin a stop string."""
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
        """`push` for a call with stop strings: decode the step, then find the stop string that ends first."""
        before = len(self.token_ids)
        pieces = [self._decode(token_id) for token_id in (token_ids[:-1] if stop_terminated else token_ids)]
        if stop_terminated and token_ids:
            pieces.append("")
        ends = list(accumulate(map(len, pieces), initial=len(self._text)))  # where each new token's text ends
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
        """The stop string that ends first within the last `new_chars`, and its start in the text; None without any."""
        if not new_chars:
            return None
        hits = [(self._text.find(stop, 1 - new_chars - len(stop)), stop) for stop in self._stop]
        ends = [(start + len(stop), order) for order, (start, stop) in enumerate(hits) if start >= 0]
        if not ends:
            return None
        start, stop = hits[min(ends)[1]]
        return stop, start

    def _decode(self, token_id: int) -> str:
        if self._unseen[token_id]:
            return ""
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception as e:
            text = self._recover(token_id, e)
        if text:
            if self._open:
                self._open = []
            return text
        self._open.append(token_id)
        return self._flush_open() if len(self._open) > MAX_OPEN_TOKENS else ""

    def _flush_open(self) -> str:
        """The text of tokens that are too many to be one incomplete character, except for the last tokens."""
        tokens, self._open = self._open, []
        cut = self._cut(tokens)
        self._stream = DecodeStream(skip_special_tokens=self._skip_special)
        return self._text_of(tokens[:cut]) + "".join(map(self._decode, tokens[cut:]))

    def _cut(self, tokens: list[int]) -> int:
        """An index at which tokens can be decoded in two parts to the same text, so not inside a broken character."""
        whole, latest = self._text_of(tokens), len(tokens) - KEPT_TOKENS
        for cut in range(latest, latest - KEPT_TOKENS, -1):
            if self._text_of(tokens[:cut]) + self._text_of(tokens[cut:]) == whole:
                return cut
        return latest

    def _text_of(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=self._skip_special)
        return text

    def _recover(self, token_id: int, error: Exception) -> str | None:
        """The text of a token on which the stream has failed. Raises `error` unless it is known to be harmless."""
        if isinstance(error, (OverflowError, TypeError)):  # not a token id at all
            return None
        if not str(error).startswith(INVALID_PREFIX):
            raise error
        self._open = []
        self._stream = DecodeStream(skip_special_tokens=self._skip_special)
        return self._stream.step(self._tokenizer, token_id)


def priming_ids(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], unsafe_ids: Collection[int], *, skip_special_tokens: bool = True
) -> Sequence[int]:
    """The part of a prompt that primes a stream as the whole prompt would; usually at most its last TAIL_TOKENS.

    DecodeStream decodes its priming ids twice at the first token, which takes milliseconds for a long prompt. The text
    after a prompt depends only on the prompt's tail, if the tail begins with a token outside `unsafe_ids` (byte tokens,
    whose runs decode together, and added tokens, which may be skipped), has text, and does not end inside a character.
    """
    if len(prompt_ids) <= TAIL_TOKENS:
        return prompt_ids
    tail = prompt_ids[-TAIL_TOKENS:]
    for start in range(TAIL_TOKENS // 2):
        if tail[start] in unsafe_ids:
            continue
        text = tokenizer.decode(list(tail[start:]), skip_special_tokens=skip_special_tokens)
        return tail[start:] if text and not text.endswith(REPLACEMENT) else prompt_ids
    return prompt_ids
