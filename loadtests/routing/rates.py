"""Measured prefill rates of workers, learnt from the times of first tokens.

A worker computes prompts one after the other. So the time since the later of two events, this call was sent or the call
before had its first token, is what its uncached tokens took. Sums of tokens and of times give the rate. They decay with
each sample, and with time, so that a worker that gets no calls because it was slow is tried again.
"""

from __future__ import annotations

from math import exp
from statistics import median

KEPT = 0.8
"""Weight that a sample keeps at the next one."""
MEMORY_S = 30.0
"""Time in which the weight of a worker's samples falls to 1/e."""
STEP_TOKENS = 256.0
"""Tokens added to each sample, about what a step costs besides its prompt tokens."""
PRIOR_TOKENS = 1024.0
"""Tokens at the usual rate that are added to the samples of each worker, so that one sample decides little."""
NOISE = 1.3
"""Slowness, or its inverse, up to which a worker counts as a usual one."""


class PrefillRates:
    """Prefill rates of the workers of one model, as one gateway sees them. Times are in seconds."""

    def __init__(self, workers: int) -> None:
        self._tokens = [0.0] * workers
        self._seconds = [0.0] * workers
        self._at = [0.0] * workers
        self._sent: list[dict[str, float]] = [{} for _ in range(workers)]
        self._last_first = [0.0] * workers
        self._usual = 0.0
        """Median rate of the workers in tokens per second; 0 without samples."""

    def record_sent(self, worker: int, call_id: str, now: float) -> None:
        """Record a call that was sent to a worker."""
        self._sent[worker][call_id] = now

    def record_first(self, worker: int, call_id: str, uncached_tokens: int, now: float) -> None:
        """Record a first token, and how many tokens the worker computed for it."""
        since = max(self._sent[worker].pop(call_id, now), self._last_first[worker])
        self._last_first[worker] = now
        kept = KEPT * exp((self._at[worker] - now) / MEMORY_S)
        self._at[worker] = now
        self._tokens[worker] = self._tokens[worker] * kept + uncached_tokens + STEP_TOKENS
        self._seconds[worker] = self._seconds[worker] * kept + now - since
        rates = [tokens / s for tokens, s in zip(self._tokens, self._seconds, strict=True) if s > 0]
        self._usual = median(rates) if rates else 0.0

    def slowness(self, worker: int, now: float) -> float:
        """Return how many times slower than the median worker a worker is; 1 without samples."""
        if not self._usual:
            return 1.0
        kept = exp((self._at[worker] - now) / MEMORY_S)
        usual_s = (self._tokens[worker] * kept + PRIOR_TOKENS) / self._usual
        ratio = (self._seconds[worker] * kept + PRIOR_TOKENS / self._usual) / usual_s
        return 1.0 if 1 / NOISE <= ratio <= NOISE else ratio
