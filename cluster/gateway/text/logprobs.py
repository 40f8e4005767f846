"""The log probabilities of one call as its caller sees them: texts and bytes beside the numbers, as vLLM's server does.

A token alone may be a part of a character. Its text is then what it adds to the sampled tokens before it: the whole
character for the token that completes it, nothing for those that do not. Alternatives at a position are looked at
with the same sampled tokens before them, never with each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from cluster.api.types import PositionLogprobs

LEAST_LOGPROB: Final = -9999.0
"""What minus infinity is written as: JSON has no such number."""
CONTEXT_TOKENS: Final = 4
REPLACEMENT: Final = "\ufffd"


class TokenTexts(Protocol):
    """What this module needs of a tokenizer."""

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself, a leading space included."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of several tokens."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's log probability. `top` holds the most likely tokens at the position, the sampled one first."""

    token_id: int
    token: str
    token_bytes: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


class LogprobSource(Protocol):
    """What an output needs of whatever makes log probabilities readable."""

    def push(self, positions: Iterable[PositionLogprobs]) -> list[TokenLogprob]:
        """Add a step's positions; those that may be told come out."""

    def restore(self, token_ids: Sequence[int]) -> None:
        """These were sampled, and told, before. Raises ValueError when it cannot go on from there."""


class LogprobTexts:
    """Turns one call's positions, in order, into TokenLogprobs. Keeps the last sampled tokens between steps."""

    def __init__(self, texts: TokenTexts, top_logprobs: int) -> None:
        """`top_logprobs`: how many alternatives are told at each position; the sampled token is one of them."""
        self._texts = texts
        self._top_logprobs = top_logprobs
        self._context: deque[int] = deque(maxlen=CONTEXT_TOKENS)

    def restore(self, token_ids: Sequence[int]) -> None:
        """These were sampled, and told, before."""
        self._context.extend(token_ids[-CONTEXT_TOKENS:])

    def push(self, positions: Iterable[PositionLogprobs]) -> list[TokenLogprob]:
        """The positions of a step. A position with no tokens is left out."""
        return [self._position(position) for position in positions if position.token_ids]

    def _position(self, position: PositionLogprobs) -> TokenLogprob:
        context = list(self._context)
        numbers: dict[int, float] = {}  # the sampled token comes again among the most likely: once is enough
        for token_id, logprob in zip(position.token_ids, position.logprobs, strict=True):
            numbers[token_id] = logprob
        sampled = position.token_ids[0]
        wanted = list(numbers)[: max(self._top_logprobs, 1)]
        told = [self._told(token_id, numbers[token_id], context) for token_id in wanted]
        self._context.append(sampled)
        first = told[0]
        top = tuple(told[: self._top_logprobs])
        return TokenLogprob(first.token_id, first.token, first.token_bytes, first.logprob, top)

    def _told(self, token_id: int, logprob: float, context: Sequence[int]) -> TokenLogprob:
        text = self._texts.token_text(token_id)
        if text.endswith(REPLACEMENT):
            text = self._completed(token_id, context)
        return TokenLogprob(token_id, text, text.encode(errors="replace"), max(logprob, LEAST_LOGPROB))

    def _completed(self, token_id: int, context: Sequence[int]) -> str:
        """What the token completes: the text with as few of the sampled tokens before it as make it whole, or none.

        Those few are all parts of the character: a whole token before them would not have been needed.
        """
        for length in range(1, len(context) + 1):
            text = self._texts.decode([*context[-length:], token_id], skip_special_tokens=False)
            if not text.endswith(REPLACEMENT):
                return text
        return ""
