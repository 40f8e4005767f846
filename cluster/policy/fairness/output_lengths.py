"""How long a tenant's outputs are, learnt by model: what to expect for fair turns and scaling, a high quantile for
limits.

Many outputs end because they may not be longer (max_tokens), so that it is only known that they would have had at least
so many tokens. Their mean says too little of one that may be longer, and the lesser of a mean and max_tokens says too
little of a mix. What is expected is therefore the restricted mean of the Kaplan-Meier estimate, the area under its
survival curve up to max_tokens: tenants whose outputs all run to their max_tokens are expected to do so again.
Of a pair of which nothing was seen the model's other outputs tell, else anybody's, and only then a default.
Invariant: memory is bounded, in outputs a pair and in pairs; the pair longest unused goes first.
Source: Kaplan & Meier, Nonparametric Estimation from Incomplete Observations (JASA 53, 1958).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import TypeVar

Key = TypeVar("Key")

KEPT = 64
DEFAULT_TOKENS = 256
QUANTILE = 0.95
RELEARNT_PART = 16
"""What is expected is found anew when one in so many of the kept outputs is new: it costs as much as sorting them."""


class _Lengths:
    __slots__ = ("_area", "_high", "_left", "_news", "_times", "last", "total")

    def __init__(self) -> None:
        self.last: deque[tuple[int, bool]] = deque(maxlen=KEPT)
        """Tokens, and whether the output would have gone on."""
        self.total = 0
        self._high: int | None = 0
        self._news = 0
        self._times: Sequence[int] = ()
        self._area: Sequence[float] = ()
        self._left: Sequence[float] = ()

    def add(self, tokens: int, cut: bool) -> None:
        if len(self.last) == KEPT:
            self.total -= self.last[0][0]
        self.last.append((tokens, cut))
        self.total += tokens
        self._high = None
        self._news += 1

    def expected(self, default_tokens: int, max_tokens: int) -> float:
        """The area under the survival curve up to `max_tokens`. Of those that outlive all that was seen no more is
        known than of any output of which nothing was seen."""
        if self._news * RELEARNT_PART >= len(self.last):
            self._curve()
        at = bisect_right(self._times, max_tokens) - 1
        if at < 0:
            return float(max_tokens)
        beyond = max_tokens - self._times[at]
        if at == len(self._times) - 1:
            beyond = min(beyond, default_tokens)
        return self._area[at] + self._left[at] * beyond

    def _curve(self) -> None:
        """At each length that was seen: the area up to it, and who outlives it."""
        self._news = 0
        ends: dict[int, list[int]] = {}
        for tokens, cut in self.last:
            ends.setdefault(tokens, [0, 0])[cut] += 1
        times, areas, lefts = [], [], []
        at_risk, before, area, left = len(self.last), 0, 0.0, 1.0
        for tokens in sorted(ends):
            ended, cut_short = ends[tokens]
            area += left * (tokens - before)
            left *= 1.0 - ended / at_risk
            at_risk -= ended + cut_short
            before = tokens
            times.append(tokens)
            areas.append(area)
            lefts.append(left)
        self._times, self._area, self._left = times, areas, lefts

    @property
    def high(self) -> int:
        """Sorted when it is asked for: the lengths of a burst's outputs come and go together."""
        if self._high is None:
            ordered = sorted(tokens for tokens, _ in self.last)
            self._high = ordered[min(int(QUANTILE * len(ordered)), len(ordered) - 1)]
        return self._high


class LearntOutputs:
    """By (tenant, model): the last outputs' lengths in tokens."""

    def __init__(self, *, default_tokens: int = DEFAULT_TOKENS, max_pairs: int = 50_000) -> None:
        self._default_tokens = default_tokens
        self._max_pairs = max_pairs
        self._pairs: OrderedDict[tuple[str, str], _Lengths] = OrderedDict()
        self._models: OrderedDict[str, _Lengths] = OrderedDict()
        self._all: _Lengths | None = None

    def observe(self, tenant: str, model: str, tokens: int, *, cut: bool = False) -> None:
        """A sequence has ended with so many. `cut`: by its max_tokens, so that it would have had more."""
        tokens = max(tokens, 0)
        self._of(self._pairs, (tenant, model)).add(tokens, cut)
        self._of(self._models, model).add(tokens, cut)
        if self._all is None:
            self._all = _Lengths()
        self._all.add(tokens, cut)

    def _of(self, kept: OrderedDict[Key, _Lengths], key: Key) -> _Lengths:
        """The newest then."""
        lengths = kept.get(key)
        if lengths is None:
            lengths = kept[key] = _Lengths()
            if len(kept) > self._max_pairs:
                kept.popitem(last=False)
        else:
            kept.move_to_end(key)
        return lengths

    def expected(self, tenant: str, model: str, max_tokens: int) -> int:
        """What the next is expected to have, at most `max_tokens` and at least 1 of them."""
        lengths = self._pairs.get((tenant, model)) or self._models.get(model) or self._all
        if lengths is None:
            return max(min(self._default_tokens, max_tokens), 1)
        return max(min(round(lengths.expected(self._default_tokens, max_tokens)), max_tokens), 1)

    def mean(self, tenant: str, model: str, max_tokens: int) -> int:
        """Of those that were seen, at most `max_tokens` and at least 1 of them."""
        lengths = self._pairs.get((tenant, model))
        expected = self._default_tokens if lengths is None else round(lengths.total / len(lengths.last))
        return max(min(expected, max_tokens), 1)

    def p95(self, tenant: str, model: str, max_tokens: int) -> int:
        """What 95 of 100 do not exceed, at most `max_tokens` and at least 1 of them."""
        lengths = self._pairs.get((tenant, model))
        return max(min(self._default_tokens if lengths is None else lengths.high, max_tokens), 1)

    def __repr__(self) -> str:
        return f"LearntOutputs({len(self._pairs)} pairs)"
