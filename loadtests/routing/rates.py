"""Measured prefill rates of workers, learnt from the times of first tokens.

A worker computes prompts one after the other. So the time since the later of two events, this call was sent or the call
before had its first token, is what its uncached tokens took. Sums of tokens and of times, both of which decay, give the
rate; short prompts count little.
"""

from __future__ import annotations

from statistics import median

DECAY = 0.9
"""Weight that a sample keeps at the next one."""
SAMPLE_TOKENS = 512.0
"""Tokens added to each sample, about what a step costs besides its prompt tokens."""


class PrefillRates:
    """Prefill rates of the workers of one model, in tokens per second, as one gateway sees them."""

    def __init__(self, workers: int) -> None:
        self._tokens = [0.0] * workers
        self._seconds = [0.0] * workers
        self._sent: list[dict[str, float]] = [{} for _ in range(workers)]
        self._last_first = [0.0] * workers

    def record_sent(self, worker: int, call_id: str, now: float) -> None:
        """Record a call that was sent to a worker."""
        self._sent[worker][call_id] = now

    def record_first(self, worker: int, call_id: str, uncached_tokens: int, now: float) -> None:
        """Record a first token, and how many tokens the worker computed for it."""
        since = max(self._sent[worker].pop(call_id, now), self._last_first[worker])
        self._last_first[worker] = now
        self._tokens[worker] = self._tokens[worker] * DECAY + uncached_tokens + SAMPLE_TOKENS
        self._seconds[worker] = self._seconds[worker] * DECAY + now - since

    def rate(self, worker: int) -> float:
        """Return the rate of a worker in tokens per second; 0 without samples."""
        return self._tokens[worker] / self._seconds[worker] if self._seconds[worker] > 0 else 0.0

    def relative(self, worker_id: str) -> float:
        """Return how many times slower than the median worker a worker is; 1 without samples."""
        rates = [rate for at in range(len(self._tokens)) if (rate := self.rate(at))]
        own = self.rate(int(worker_id))
        return median(rates) / own if own and rates else 1.0
