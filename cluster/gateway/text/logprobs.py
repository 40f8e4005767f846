"""Log probabilities of one sequence with the text and bytes of each token, as vLLM's server returns them.

A character may be split over several tokens. The last of these tokens then has the whole character as its text, and
the tokens before it have no text. Each alternative at a position is decoded after the same sampled tokens,
independently of the other alternatives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Final, Protocol

from cluster.api.frozen import frozen_dataclass
from cluster.api.types import PositionLogprobs

LEAST_LOGPROB: Final = -9999.0
"""The log probability that is reported instead of minus infinity and of NaN, which JSON cannot represent."""
CONTEXT_TOKENS: Final = 4
REPLACEMENT: Final = "\ufffd"


class TokenTexts(Protocol):
    """Protocol of a tokenizer, with the methods that this module calls."""

    def token_text(self, token_id: int) -> str:
        """Return the text of one token by itself, a leading space included."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of several tokens."""


@frozen_dataclass
class TokenLogprob:
    """The log probability of one token. `top`: the sampled token, followed by the most likely other tokens at the same
    position."""

    token_id: int
    token: str
    token_bytes: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


class LogprobSource(Protocol):
    """Object that converts a sequence's sampled positions to log probabilities with texts: a LogprobTexts, or guards
    wrapped around one."""

    def push(self, positions: Iterable[PositionLogprobs]) -> list[TokenLogprob]:
        """Add the positions of a step. Returns the log probabilities that may be sent now."""

    def restore(self, token_ids: Sequence[int]) -> None:
        """Continue after tokens that were sampled and sent earlier. Raises ValueError if that is impossible."""


class LogprobTexts:
    """Converts the log probabilities of one sequence to TokenLogprobs, position by position. Keeps the last sampled
    tokens between steps, since a token's text may depend on the tokens before it."""

    def __init__(self, texts: TokenTexts, top_logprobs: int) -> None:
        """`top_logprobs`: number of alternatives to return for each position, the sampled token included."""
        self._texts = texts
        self._top_logprobs = top_logprobs
        self._context: deque[int] = deque(maxlen=CONTEXT_TOKENS)

    def restore(self, token_ids: Sequence[int]) -> None:
        """Continue after tokens that were sampled and sent earlier."""
        self._context.extend(token_ids[-CONTEXT_TOKENS:])

    def push(self, positions: Iterable[PositionLogprobs]) -> list[TokenLogprob]:
        """Return the positions of a step as TokenLogprobs. Positions without tokens are skipped."""
        return [self._position(position) for position in positions if position.token_ids]

    def _position(self, position: PositionLogprobs) -> TokenLogprob:
        context = list(self._context)
        numbers: dict[int, float] = {}  # removes the second occurrence of the sampled token among the most likely
        for token_id, logprob in zip(position.token_ids, position.logprobs, strict=True):
            numbers[token_id] = logprob
        sampled = position.token_ids[0]
        wanted = list(numbers)[: max(self._top_logprobs, 1)]
        tokens = [self._token_logprob(token_id, numbers[token_id], context) for token_id in wanted]
        self._context.append(sampled)
        first = tokens[0]
        top = tuple(tokens[: self._top_logprobs])
        return TokenLogprob(first.token_id, first.token, first.token_bytes, first.logprob, top)

    def _token_logprob(self, token_id: int, logprob: float, context: Sequence[int]) -> TokenLogprob:
        text = self._texts.token_text(token_id)
        if text.endswith(REPLACEMENT):
            text = self._completed(token_id, context)
        known = max(logprob, LEAST_LOGPROB) if isfinite(logprob) else LEAST_LOGPROB
        return TokenLogprob(token_id, text, text.encode(errors="replace"), known)

    def _completed(self, token_id: int, context: Sequence[int]) -> str:
        """Return the character that the token completes; "" if the token completes no character.

        The token is decoded together with sampled tokens before it, as few as are needed for a complete character. So
        each of these tokens is a part of that character. After a token that ends with a whole character, there is none.
        """
        if not context or not self._texts.token_text(context[-1]).endswith(REPLACEMENT):
            return ""
        for length in range(1, len(context) + 1):
            text = self._texts.decode([*context[-length:], token_id], skip_special_tokens=False)
            if not text.endswith(REPLACEMENT):
                return text
        return ""
