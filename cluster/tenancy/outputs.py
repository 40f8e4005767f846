"""How long a tenant's outputs are, learnt by model: the mean for fair turns, a high quantile for limits.

Invariant: memory is bounded, in outputs a pair and in pairs; the pair longest unused goes first.
"""

from __future__ import annotations

from collections import OrderedDict, deque

KEPT = 64
DEFAULT_TOKENS = 256
QUANTILE = 0.95


class _Lengths:
    __slots__ = ("_high", "last", "total")

    def __init__(self) -> None:
        self.last: deque[int] = deque(maxlen=KEPT)
        self.total = 0
        self._high: int | None = 0

    def add(self, tokens: int) -> None:
        if len(self.last) == KEPT:
            self.total -= self.last[0]
        self.last.append(tokens)
        self.total += tokens
        self._high = None

    @property
    def high(self) -> int:
        """Sorted when it is asked for: the lengths of a burst's outputs come and go together."""
        if self._high is None:
            ordered = sorted(self.last)
            self._high = ordered[min(int(QUANTILE * len(ordered)), len(ordered) - 1)]
        return self._high


class LearntOutputs:
    """By (tenant, model): the last outputs' lengths in tokens."""

    def __init__(self, *, default_tokens: int = DEFAULT_TOKENS, max_pairs: int = 50_000) -> None:
        self._default_tokens = default_tokens
        self._max_pairs = max_pairs
        self._pairs: OrderedDict[tuple[str, str], _Lengths] = OrderedDict()

    def observe(self, tenant: str, model: str, tokens: int) -> None:
        """A sequence has ended with so many."""
        key = (tenant, model)
        lengths = self._pairs.get(key)
        if lengths is None:
            lengths = self._pairs[key] = _Lengths()
            if len(self._pairs) > self._max_pairs:
                self._pairs.popitem(last=False)
        else:
            self._pairs.move_to_end(key)
        lengths.add(max(tokens, 0))

    def mean(self, tenant: str, model: str, max_tokens: int) -> int:
        """What the next is expected to have, at most `max_tokens` and at least 1 of them."""
        lengths = self._pairs.get((tenant, model))
        expected = self._default_tokens if lengths is None else round(lengths.total / len(lengths.last))
        return max(min(expected, max_tokens), 1)

    def p95(self, tenant: str, model: str, max_tokens: int) -> int:
        """What 95 of 100 do not exceed, at most `max_tokens` and at least 1 of them."""
        lengths = self._pairs.get((tenant, model))
        return max(min(self._default_tokens if lengths is None else lengths.high, max_tokens), 1)

    def __repr__(self) -> str:
        return f"LearntOutputs({len(self._pairs)} pairs)"
