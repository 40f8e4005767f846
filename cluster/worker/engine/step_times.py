"""Durations of an engine's steps, which distinguish a hung step from a step with much work.

Problem: a process that waits for a step cannot tell whether the step hangs. Invariant: waiting prompt tokens explain a
step's duration only up to a bound, so that a queue of prompts cannot hide a hang for a long time. The bound is the
number of prompt tokens times the time per prompt token. The time per prompt token is a high quantile of the times in
the steps so far. Before the first such step, a high value is assumed.

Quantiles come from a histogram in which each bucket is a tenth larger than the one before. Its counts are halved now
and then, so that old durations lose weight. Adding a duration takes one logarithm. One thread adds durations; any
thread may read.
"""

from __future__ import annotations

import math

SHORTEST_S = 1e-6
GROWTH = 1.1
BUCKETS = 240
"""Number of buckets. The last bucket is at about two hours."""
FORGET_AFTER = 4096
"""Number of samples in the histogram at which all counts are halved."""
QUANTILE_EVERY = 16

FIRST_TOKEN_S = 0.05
"""Assumed seconds per prompt token before any time has been measured."""
PATIENCE = 5.0
"""Factor by which a step may exceed its expected duration and still count as explained. The expected duration is the
number of prompt tokens times the 0.9 quantile of the time per prompt token."""
LEAST_S = 0.5
"""Step duration in seconds that any positive number of prompt tokens explains."""
SAMPLE_TOKENS = 8
"""Smallest number of prompt tokens that a step must have for the time per token to be learned from it."""


class Quantile:
    """A quantile of the last few thousand durations. `order`: which quantile, between 0 and 1."""

    __slots__ = ("_counts", "_order", "_total", "_value")

    def __init__(self, order: float = 0.99) -> None:
        self._order = order
        self._counts = [0] * BUCKETS
        self._total = 0
        self._value = 0.0

    def add(self, seconds: float) -> None:
        """Add a duration."""
        at = math.ceil(math.log(seconds / SHORTEST_S, GROWTH)) if seconds > SHORTEST_S else 0
        self._counts[min(at, BUCKETS - 1)] += 1
        self._total += 1
        if self._total >= FORGET_AFTER:
            self._counts = [count // 2 for count in self._counts]
            self._total = sum(self._counts)
        if self._total <= QUANTILE_EVERY or self._total % QUANTILE_EVERY == 0:
            self._value = self._compute()

    @property
    def value_s(self) -> float:
        """The quantile in seconds, overestimated by at most a tenth; 0 before the first duration."""
        return self._value

    def _compute(self) -> float:
        above = self._total - math.ceil(self._order * self._total)
        seen = 0
        for at in range(BUCKETS - 1, -1, -1):
            seen += self._counts[at]
            if seen > above:
                return SHORTEST_S * GROWTH**at
        return 0.0


class StepTimes:
    """The step durations of one engine.

    One thread calls `began`, `step`, `prefilled` and `mark_idle` as these events happen; any thread may call the other
    methods.
    """

    __slots__ = ("_most_tokens", "_per_token", "_since", "last_s", "times")

    def __init__(self, most_tokens: int = 1 << 30) -> None:
        """Create the object without durations. `most_tokens`: the most tokens that one step computes."""
        self._most_tokens = most_tokens
        self._per_token = Quantile(0.9)  # not the maximum: a step delayed for another reason must not count for ever
        self._since: float | None = None
        self.last_s = 0.0
        self.times = Quantile()

    def set_limit(self, most_tokens: int) -> None:
        """Set the largest number of tokens that one step computes, if it was not known at construction."""
        self._most_tokens = most_tokens

    def began(self, now: float) -> None:
        """Record that the engine starts a step after it was idle."""
        self._since = now

    def step(self, now: float, *, goes_on: bool = True) -> None:
        """Record the end of a step. `goes_on`: whether the next step begins at once."""
        if self._since is not None:
            self.last_s = now - self._since
            self.times.add(self.last_s)
        self._since = now if goes_on else None

    def prefilled(self, tokens: int) -> None:
        """Record that prompts were completed in the last step.

        `tokens`: number of tokens of these prompts that were computed.
        """
        tokens = min(tokens, self._most_tokens)
        if tokens >= SAMPLE_TOKENS:
            self._per_token.add(self.last_s / tokens)

    def mark_idle(self) -> None:
        """Record that the engine is idle."""
        self._since = None

    def age_s(self, now: float) -> float:
        """Return the age of the current step in seconds; 0 if the engine is idle."""
        since = self._since
        return max(0.0, now - since) if since is not None else 0.0

    def explains(self, now: float, prompt_tokens: int) -> bool:
        """Return whether waiting prompts can explain how long the current step has taken so far. `prompt_tokens`:
        number of waiting prompt tokens."""
        if prompt_tokens <= 0:
            return False
        tokens = min(prompt_tokens, self._most_tokens)
        return self.age_s(now) <= max(LEAST_S, PATIENCE * tokens * (self._per_token.value_s or FIRST_TOKEN_S))
