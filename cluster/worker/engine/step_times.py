"""How long an engine's steps take, so that one that hangs can be told from one that has much to do.

Problem: whoever waits for a step sees the same silence in both cases. Invariant: a step that stands longer than its
stated work explains is stated as no work at all, so that no queue of prompts can hide a hang. The work is prompt
tokens: what they may cost is learned from the slowest steps so far, and until then taken generously.

The quantile comes from a histogram with buckets that grow by a tenth, whose counts are halved now and then: it forgets
what the engine was like long ago, and an addition costs a logarithm. One thread adds; any may read.
"""

from __future__ import annotations

import math

SHORTEST_S = 1e-6
GROWTH = 1.1
BUCKETS = 240
"""Up to about two hours."""
FORGET_AFTER = 4096
"""Samples in the histogram when all counts are halved."""
QUANTILE_EVERY = 16

FIRST_TOKEN_S = 0.05
"""Seconds that a prompt token may take before any has been seen."""
PATIENCE = 5.0
"""Times as long as prompt tokens usually take at most they may take before the work no longer explains it."""
LEAST_S = 0.5
"""Prompt tokens explain as much in any case."""
SAMPLE_TOKENS = 8
"""So few in a step at least tell what one costs."""


class Quantile:
    """A quantile of durations, of the last few thousand."""

    __slots__ = ("_counts", "_order", "_total", "_value")

    def __init__(self, order: float = 0.99) -> None:
        self._order = order
        self._counts = [0] * BUCKETS
        self._total = 0
        self._value = 0.0

    def add(self, seconds: float) -> None:
        """One more duration."""
        at = math.ceil(math.log(seconds / SHORTEST_S, GROWTH)) if seconds > SHORTEST_S else 0
        self._counts[min(at, BUCKETS - 1)] += 1
        self._total += 1
        if self._total >= FORGET_AFTER:
            self._counts = [count // 2 for count in self._counts]
            self._total = sum(self._counts)
        if self._total <= QUANTILE_EVERY or self._total % QUANTILE_EVERY == 0:
            self._value = self._find()

    @property
    def value_s(self) -> float:
        """The quantile, at most a tenth too long; 0 before the first duration."""
        return self._value

    def _find(self) -> float:
        above = self._total - math.ceil(self._order * self._total)
        seen = 0
        for at in range(BUCKETS - 1, -1, -1):
            seen += self._counts[at]
            if seen > above:
                return SHORTEST_S * GROWTH**at
        return 0.0


class StepTimes:
    """The steps of one engine. `began`, `step` and `prefilled` as they happen; the rest may be read by any thread."""

    __slots__ = ("_most_tokens", "_per_token", "_since", "last_s", "times")

    def __init__(self, most_tokens: int = 1 << 30) -> None:
        """`most_tokens`: what one step computes at most."""
        self._most_tokens = most_tokens
        self._per_token = Quantile(0.9)  # a step that stood for another reason must not count for ever
        self._since: float | None = None
        self.last_s = 0.0
        self.times = Quantile()

    def limit(self, most_tokens: int) -> None:
        """Tell what one step computes at most, where that is known late."""
        self._most_tokens = most_tokens

    def began(self, now: float) -> None:
        """There is work, after there was none."""
        self._since = now

    def step(self, now: float, *, goes_on: bool = True) -> None:
        """A step has ended."""
        if self._since is not None:
            self.last_s = now - self._since
            self.times.add(self.last_s)
        self._since = now if goes_on else None

    def prefilled(self, tokens: int) -> None:
        """The last step was the end of prompts of so many tokens."""
        tokens = min(tokens, self._most_tokens)
        if tokens >= SAMPLE_TOKENS:
            self._per_token.add(self.last_s / tokens)

    def rested(self) -> None:
        """There is no work any more."""
        self._since = None

    def age_s(self, now: float) -> float:
        """For how long the step under way has run; 0 at rest."""
        since = self._since
        return max(0.0, now - since) if since is not None else 0.0

    def explains(self, now: float, prompt_tokens: int) -> bool:
        """Whether so many prompt tokens explain that the step under way is not yet done."""
        if prompt_tokens <= 0:
            return False
        tokens = min(prompt_tokens, self._most_tokens)
        return self.age_s(now) <= max(LEAST_S, PATIENCE * tokens * (self._per_token.value_s or FIRST_TOKEN_S))
