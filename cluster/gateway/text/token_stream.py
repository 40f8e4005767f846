"""Conversion of a sequence's tokens into text, token by token. Stop strings are searched for later, in detokenizer.py.

The text of a token depends on the tokens around it: a character may be split over tokens, and sentencepiece models drop
the first space of a text. So the stream (DecodeStream of the tokenizers library) starts after the tokens of the prompt,
and emits only complete characters. As in vLLM, the stream is restarted without the prompt if a decode contradicts the
emitted text (invalid bytes after valid bytes).

At each new token, DecodeStream decodes again all tokens that have no text yet. For a sequence that never completes a
character, or that ends in special tokens only, the cost would grow with the square of the length. Therefore two cases
bypass DecodeStream. Tokens that no decoder sees (skipped special tokens, and ids without a token) add no text. And a
run of more than MAX_OPEN_TOKENS tokens without text is decoded in one piece, except for its last tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

INVALID_PREFIX: Final = "Invalid prefix encountered"
TAIL_TOKENS: Final = 96
"""Number of tokens at the end of a long prompt that prime a stream, if they are equivalent to the whole prompt."""
REPLACEMENT: Final = "\ufffd"
MAX_OPEN_TOKENS: Final = 256
"""Maximum number of successive tokens without text that are treated as one incomplete character. Each of these tokens
costs a decode of all of them so far, about 50 us on average."""
KEPT_TOKENS: Final = 16
"""Number of tokens at the end of a run of more than MAX_OPEN_TOKENS that stay in the stream, because they may begin a
character."""


class UnseenTokens(dict[int, bool]):
    """Map from a token id to whether the token has no text in the output: either the id is unknown, or the token is
    special and special tokens are skipped. An entry is computed when its token is first looked up."""

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


class TokenStream:
    """The decoding of one sequence. A token that completes no character has no text of its own; the token that
    completes the character has the whole character as its text."""

    __slots__ = ("_open", "_skip_special", "_stream", "_tokenizer", "_unseen")

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], unseen: UnseenTokens, *, skip_special_tokens: bool
    ) -> None:
        """Start a stream that continues after the tokens `prompt_ids`. `unseen`: the table of skipped tokens, made for
        the same tokenizer and with the same `skip_special_tokens`."""
        self._tokenizer = tokenizer
        self._unseen = unseen
        self._skip_special = skip_special_tokens
        self._open: list[int] = []
        """Tokens in the stream that have no text yet."""
        self.restart(prompt_ids)

    def restart(self, token_ids: Sequence[int]) -> None:
        """Start the stream anew, as if exactly the tokens `token_ids` had been decoded so far."""
        self._stream = DecodeStream(ids=list(token_ids), skip_special_tokens=self._skip_special)

    def decode(self, token_id: int) -> str:
        """Add a token. Returns the text that the token completes, or "" while a character is incomplete."""
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
        """Return the text of the open tokens (tokens without text so far), which are too many to be one incomplete
        character. All but the last few are decoded in one piece. The last few are decoded by a new stream, and stay
        open if they have no text."""
        tokens, self._open = self._open, []
        cut = self._cut(tokens)
        self._stream = DecodeStream(skip_special_tokens=self._skip_special)
        return self.text_of(tokens[:cut]) + "".join(map(self.decode, tokens[cut:]))

    def _cut(self, tokens: list[int]) -> int:
        """Return an index near the end at which `tokens` can be cut without changing the text: the texts of the two
        parts, joined, equal the text of all tokens. The KEPT_TOKENS indexes from `len(tokens) - KEPT_TOKENS` downwards
        are tried. If no index works, the first one tried is returned."""
        whole, latest = self.text_of(tokens), len(tokens) - KEPT_TOKENS
        for cut in range(latest, latest - KEPT_TOKENS, -1):
            if self.text_of(tokens[:cut]) + self.text_of(tokens[cut:]) == whole:
                return cut
        return latest

    def text_of(self, tokens: list[int]) -> str:
        """Return the text of tokens, decoded without the tokens before them."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=self._skip_special)
        return text

    def _recover(self, token_id: int, error: Exception) -> str | None:
        """Continue after the stream has raised `error` for a token. Returns the token's text, decoded by a new stream,
        or None if the token id is invalid. Raises `error` again if it has another cause than the token's text."""
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
    """Return the last ids of a prompt, usually at most TAIL_TOKENS. A stream that starts with these ids gives the same
    text as a stream that starts with the whole prompt.

    Reason: DecodeStream decodes these ids twice at the first token, which takes milliseconds for a long prompt. The
    text after a prompt depends only on the tail of the prompt if three conditions hold: the tail begins with a token
    outside `unsafe_ids`, the tail has text, and the tail does not end inside a character. `unsafe_ids`: the byte
    tokens, since runs of byte tokens are decoded together, and the added tokens, which may be skipped.
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
