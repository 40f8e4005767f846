"""Learnt output lengths by tenant and model. Fair queuing and scaling use the expected length; limits use a high
quantile.

Many outputs end at max_tokens, so only a lower bound of their length is known (censored data). The mean of the observed
lengths is therefore too low for a call with a larger max_tokens. The expected length is the restricted mean of the
Kaplan-Meier estimate: the area under the survival curve up to max_tokens. If all outputs of a tenant run to their
max_tokens, the next outputs are expected to do so too.

If a (tenant, model) pair has no observations, its expected length comes from all outputs of the model, else from all
outputs, else from a default.

Invariant: memory is bounded, in outputs per pair and in number of pairs. The least recently used pair is dropped first.

Source: Kaplan & Meier, Nonparametric Estimation from Incomplete Observations (JASA 53, 1958).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")

KEPT = 64
DEFAULT_TOKENS = 256
QUANTILE = 0.95
RELEARNT_PART = 16
"""The survival curve is computed again only when at least 1 / RELEARNT_PART of the kept outputs are new. Computing the
curve costs as much as sorting the outputs."""


class _Lengths:
    __slots__ = ("_area", "_high", "_new_since_curve", "_survival", "_times", "last")

    def __init__(self) -> None:
        self.last: list[tuple[int, bool]] = []
        """The last KEPT pairs of (tokens, cut). `cut` says whether the output ended at max_tokens. The pairs are in a
        list and not in a deque, because there are many such objects, and an empty deque takes 0.7 KB."""
        self._high: int | None = 0
        self._new_since_curve = 0
        self._times: Sequence[int] = ()
        self._area: Sequence[float] = ()
        self._survival: Sequence[float] = ()

    def add(self, tokens: int, cut: bool) -> None:
        if len(self.last) == KEPT:
            del self.last[0]
        self.last.append((tokens, cut))
        self._high = None
        self._new_since_curve += 1

    def expected(self, default_tokens: int, max_tokens: int) -> float:
        """Expected length of the next output, in tokens: the area under the survival curve up to `max_tokens`. For
        each length, the survival curve has the share of outputs that are longer.

        Beyond the longest observed length, the curve is assumed to stay flat for at most `default_tokens` tokens.
        """
        if self._new_since_curve * RELEARNT_PART >= len(self.last):
            self._curve()
        at = bisect_right(self._times, max_tokens) - 1
        if at < 0:
            return float(max_tokens)
        beyond = max_tokens - self._times[at]
        if at == len(self._times) - 1:
            beyond = min(beyond, default_tokens)
        return self._area[at] + self._survival[at] * beyond

    def _curve(self) -> None:
        """Compute the survival curve: for each observed length, the area under the curve up to this length, and the
        estimated share of longer outputs."""
        self._new_since_curve = 0
        ends: dict[int, list[int]] = {}
        for (tokens, cut), count in Counter(self.last).items():
            ends.setdefault(tokens, [0, 0])[cut] += count
        times, areas, survivals = [], [], []
        at_risk, before, area, survival = len(self.last), 0, 0.0, 1.0
        for tokens in sorted(ends):
            ended, cut_short = ends[tokens]
            area += survival * (tokens - before)
            survival *= 1.0 - ended / at_risk
            at_risk -= ended + cut_short
            before = tokens
            times.append(tokens)
            areas.append(area)
            survivals.append(survival)
        self._times, self._area, self._survival = times, areas, survivals

    @property
    def high(self) -> int:
        """Length at the quantile QUANTILE. Computed on demand, so that a burst of outputs is sorted only once."""
        if self._high is None:
            ordered = sorted(self.last)
            self._high = ordered[min(int(QUANTILE * len(ordered)), len(ordered) - 1)][0]
        return self._high


class LearntOutputs:
    """Lengths of recent outputs in tokens, by (tenant, model)."""

    def __init__(self, *, default_tokens: int = DEFAULT_TOKENS, max_pairs: int = 50_000) -> None:
        self._default_tokens = default_tokens
        self._max_pairs = max_pairs
        self._pairs: OrderedDict[tuple[str, str], _Lengths] = OrderedDict()
        self._models: OrderedDict[str, _Lengths] = OrderedDict()
        self._all: _Lengths | None = None

    def observe(self, tenant: str, model: str, tokens: int, *, cut: bool = False) -> None:
        """Record the output length of a sequence that has ended. `cut`: whether the output was cut off at
        max_tokens."""
        tokens = max(tokens, 0)
        _used(self._pairs, (tenant, model), _Lengths, self._max_pairs).add(tokens, cut)
        _used(self._models, model, _Lengths, self._max_pairs).add(tokens, cut)
        if self._all is None:
            self._all = _Lengths()
        self._all.add(tokens, cut)

    def expected(self, tenant: str, model: str, max_tokens: int) -> int:
        """Return the expected length of the next output in tokens, between 1 and `max_tokens`."""
        lengths = self._pairs.get((tenant, model)) or self._models.get(model) or self._all
        if lengths is None:
            return max(min(self._default_tokens, max_tokens), 1)
        return max(min(round(lengths.expected(self._default_tokens, max_tokens)), max_tokens), 1)

    def p95(self, tenant: str, model: str, max_tokens: int) -> int:
        """Return the 95th percentile of the observed lengths, at least 1 and at most `max_tokens`. Without
        observations, the default length is used."""
        lengths = self._pairs.get((tenant, model))
        return max(min(self._default_tokens if lengths is None else lengths.high, max_tokens), 1)

    def __repr__(self) -> str:
        return f"LearntOutputs({len(self._pairs)} pairs)"


class _Recent:
    __slots__ = ("last", "total")

    def __init__(self) -> None:
        self.last: list[int] = []
        self.total = 0


class LearntMeans:
    """Means of recent token counts, one mean for each (tenant, model) pair. At most `max_pairs` pairs are kept."""

    def __init__(self, max_pairs: int = 50_000) -> None:
        self._max_pairs = max_pairs
        self._pairs: OrderedDict[tuple[str, str], _Recent] = OrderedDict()

    def observe(self, tenant: str, model: str, tokens: int) -> None:
        """Record one token count of a tenant and a model."""
        recent = _used(self._pairs, (tenant, model), _Recent, self._max_pairs)
        recent.last.append(tokens)
        recent.total += tokens
        if len(recent.last) > KEPT:
            recent.total -= recent.last.pop(0)

    def mean(self, tenant: str, model: str, max_tokens: int) -> int:
        """Return the mean token count of a tenant and a model, at least 1 and at most `max_tokens`. Without
        observations, return 1."""
        recent = self._pairs.get((tenant, model))
        return 1 if recent is None else max(min(round(recent.total / len(recent.last)), max_tokens), 1)

    def __repr__(self) -> str:
        return f"LearntMeans({len(self._pairs)} pairs)"


def _used(kept: OrderedDict[Key, Value], key: Key, make: Callable[[], Value], most: int) -> Value:
    """Return the value of a key in `kept`, and mark the key as the most recently used. A missing value is made with
    `make`. If `kept` then has more than `most` keys, the least recently used key is dropped."""
    value = kept.get(key)
    if value is None:
        value = kept[key] = make()
        if len(kept) > most:
            kept.popitem(last=False)
    else:
        kept.move_to_end(key)
    return value
