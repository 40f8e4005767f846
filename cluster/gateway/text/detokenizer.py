"""Token ids of one running call become text, to the letter as vLLM's own front end would give it.

Theory. A token's text depends on its neighbours: a character may be split over tokens, and sentencepiece models drop
the first space of a text. So the stream is primed with the prompt and gives text only when it is complete
(tokenizers' DecodeStream). Three rules of vLLM are kept on top:

- A decode that contradicts text already given (invalid bytes after valid ones) starts the stream anew, unprimed.
- Stop strings are looked for in the text of each step; the one that ends first wins, the text ends before it and the
  tokens after the one that completed it do not count. Within the first `min_tokens` tokens none is looked for.
- What might be the beginning of a stop string, max(len(stop)) - 1 characters, is held back until the end.

DecodeStream decodes all that has no text yet anew with each token, so a call that never completes a character, or ends
in special tokens only, would cost the square of its length. Two kinds of tokens keep out of it: those that no decoder
sees (special ones that are skipped, ids without a token), which leaves the text as it is, and an incomplete character
of more than MAX_OPEN_TOKENS tokens, of which all but the last come out as they decode by themselves.

The token that ended a call by being a stop token (EOS included) counts, but has no text.

Where a tokenizer's decoder only joins bytes (byte-level BPE: LLaMA 3, Qwen, Falcon, GPT), a token that is whole
characters has the same text after every whole character, and a table gives it for a tenth of what the stream takes.
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
"""How much of a long prompt primes a stream where that is as good as the whole."""
REPLACEMENT: Final = "\ufffd"
MAX_OPEN_TOKENS: Final = 256
"""So many tokens in a row without text are no character that is still incomplete. Each costs the decoding of all before
it, some 50 us in the mean."""
KEPT_TOKENS: Final = 16
"""Of these, the last, which may be the beginning of one."""


class TextSource(Protocol):
    """What an output needs of whatever makes its tokens text: a Detokenizer, or the guards that stand before one."""

    token_ids: list[int]

    @property
    def watches(self) -> bool:
        """Whether there is something to look for, so that every token must pass `push`."""

    @property
    def refused(self) -> bool:
        """Whether a guard has ended the text."""

    @property
    def untaken(self) -> int:
        """Characters that have not been taken."""

    def untaken_tokens(self) -> int:
        """How many of the last tokens have no text that was taken."""

    def push(self, token_ids: Sequence[int], stop_terminated: bool = False) -> str | None:
        """Add a step's tokens. Returns what has ended the text, if anything has; then push no more."""

    def text_of(self, token_id: int) -> str:
        """Add one token and hand its text out. Not where it `watches`."""

    def give_back(self, text: str) -> None:
        """What `text_of` handed out last could not be sent: keep it for `take`."""

    def take(self, finished: bool) -> str:
        """The text since the last take."""

    def restore(self, token_ids: Sequence[int], chars: int) -> None:
        """Begin where another has left off. Raises ValueError when it cannot."""


class WholeTexts(dict[int, str | None]):
    """Texts of a byte-level tokenizer's tokens that are whole characters; None for all others. Filled as asked."""

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
    """Whether a token is left out before anything is decoded. Filled as asked."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder() if skip_special_tokens else {}
        self._skipped = frozenset(token_id for token_id, token in added.items() if token.special)

    def __missing__(self, token_id: int) -> bool:
        try:
            unseen = token_id in self._skipped or self._tokenizer.id_to_token(token_id) is None
        except (OverflowError, TypeError):  # no token id at all
            return True
        self[token_id] = unseen
        return unseen


def whole_texts(tokenizer: Tokenizer, unsafe_ids: Collection[int]) -> WholeTexts | None:
    """The table of a tokenizer whose decoder only joins bytes; None for another."""
    return WholeTexts(tokenizer, unsafe_ids) if isinstance(tokenizer.decoder, ByteLevel) else None


class Detokenizer:
    """The text of one call. `push` takes a step's tokens, `take` gives what may be sent; neither waits.

    `token_ids` are the output tokens that count: those after a stop string are dropped from it.
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
        """`prompt_ids` prime the stream (see `priming_ids`). `stop` strings must not be empty. `unseen`: the
        tokenizer's with the same `skip_special_tokens`, made here where it is not given."""
        if any(not text for text in stop):
            raise ValueError("stop: an empty string would stop everything: leave it out")
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
        # Where stop strings are looked for: the lengths of the tokens of which nothing has been taken, and how much is
        # left of the one before them.
        self._lengths: deque[int] = deque()
        self._part_left = 0
        self._text = ""  # what has not been taken; a stop string can only begin in here, since as much is held back

    def push(self, token_ids: Sequence[int], stop_terminated: bool = False) -> str | None:
        """Add a step's tokens. Returns the stop string that its text completed, if any; then push no more.

        `stop_terminated`: the last of them is the stop token that ended the call.
        """
        if self._stop:
            return self._push_watching(token_ids, stop_terminated)
        for token_id in token_ids[:-1] if stop_terminated else token_ids:
            self._text += self.text_of(token_id)
        if stop_terminated:
            self.token_ids += token_ids[-1:]
        return None

    def text_of(self, token_id: int) -> str:
        """Add one token, which is no stop token, and hand its text out instead of keeping it. Without stop strings."""
        if self._whole:
            text = self._whole_texts[token_id]  # type: ignore[index]
            if text is not None:
                self.token_ids.append(token_id)
                return text
            self._stream = DecodeStream(ids=self.token_ids[-1:], skip_special_tokens=self._skip_special)
        self.token_ids.append(token_id)
        text = self._decode(token_id)
        # Text means that no character is open. After a token of whole characters the table serves, and the stream,
        # which misses what the table serves, begins anew behind the last such token.
        self._whole = bool(text) and self._whole_texts is not None and self._whole_texts[token_id] is not None
        return text

    @property
    def untaken(self) -> int:
        """Characters that have not been taken."""
        return len(self._text)

    def untaken_tokens(self) -> int:
        """How many of the last tokens have no text that was taken. Without stop strings looked for when asked."""
        if self._stop:
            return len(self._lengths)
        if not self._text:
            return 0

        def chars(tokens: int) -> int:
            tail = self.token_ids[-tokens:]
            return len(self._tokenizer.decode(tail, skip_special_tokens=self._skip_special))

        return bisect_left(range(len(self.token_ids)), len(self._text), lo=1, key=chars) if self.token_ids else 0

    @property
    def watches(self) -> bool:
        """Whether there are stop strings to look for."""
        return bool(self._stop)

    @property
    def refused(self) -> bool:
        """Nobody refuses here."""
        return False

    def give_back(self, text: str) -> None:
        """What `text_of` handed out last could not be sent: keep it for `take`."""
        self._text += text

    def restore(self, token_ids: Sequence[int], chars: int) -> None:
        """Begin where another has left off, which was pushed these and of whose text as many characters were taken.

        Raises ValueError when they have not as many. Before any `push`."""
        step = self._decode if self._stop else self.text_of
        text = "".join([step(token_id) for token_id in token_ids])
        if len(text) < chars:
            raise ValueError(f"{len(token_ids)} tokens have {len(text)} characters, not {chars}")
        if self._stop:
            self.token_ids += token_ids
            self._part_left = len(text) - chars
        self._text = text[chars:]

    def take(self, finished: bool) -> str:
        """The text since the last take; all of it when `finished`, else without what might begin a stop string."""
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
        """`push` for a call with stop strings: decode the step, then look for the one that ends first."""
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
        found = self._first_stop(new_chars)
        if found is None:
            return None
        stop, start = found
        kept = bisect_left(ends, start + len(stop))  # the token that completes the stop string is the last
        del self.token_ids[before + kept :]
        for _ in range(len(pieces) - kept):
            self._lengths.pop()
        self._text = self._text[:start]
        return stop

    def _first_stop(self, new_chars: int) -> tuple[str, int] | None:
        """(stop string, where it begins in the text) of the one that ends first within the last `new_chars`."""
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
        return self._given_up() if len(self._open) > MAX_OPEN_TOKENS else ""

    def _given_up(self) -> str:
        """The text of an incomplete character that has become too long to be one, but for its last tokens."""
        tokens, self._open = self._open, []
        cut = self._cut(tokens)
        self._stream = DecodeStream(skip_special_tokens=self._skip_special)
        return self._text_of(tokens[:cut]) + "".join(map(self._decode, tokens[cut:]))

    def _cut(self, tokens: list[int]) -> int:
        """Where tokens can be decoded in two parts to the text of the whole: not inside a broken character."""
        whole, latest = self._text_of(tokens), len(tokens) - KEPT_TOKENS
        for cut in range(latest, latest - KEPT_TOKENS, -1):
            if self._text_of(tokens[:cut]) + self._text_of(tokens[cut:]) == whole:
                return cut
        return latest

    def _text_of(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=self._skip_special)
        return text

    def _recover(self, token_id: int, error: Exception) -> str | None:
        """The token's text after the stream has failed on it. Raises what is not known to be harmless."""
        if isinstance(error, (OverflowError, TypeError)):  # no token id at all
            return None
        if not str(error).startswith(INVALID_PREFIX):
            raise error
        self._open = []
        self._stream = DecodeStream(skip_special_tokens=self._skip_special)
        return self._stream.step(self._tokenizer, token_id)


def priming_ids(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], unsafe_ids: Collection[int], *, skip_special_tokens: bool = True
) -> Sequence[int]:
    """The part of a prompt that primes a stream as the whole would; usually its last TAIL_TOKENS or fewer.

    DecodeStream decodes its priming ids twice at the first token, which for a long prompt is milliseconds. What
    follows a prompt depends on its tail alone, if that begins with a token outside `unsafe_ids` (byte tokens, whose
    runs decode together, and added tokens, which may be skipped), has text, and does not end inside a character.
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
