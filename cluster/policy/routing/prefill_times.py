"""Speed of each worker of a model in computing prompts, relative to the model's usual worker.

Problem: a worker may be slow without failing any check, for example because its GPU is throttled or shared. Such a
worker must get fewer calls within seconds, and its full share again once it has recovered.

Method. A sample is the number of prompt tokens that a worker has computed and the seconds that this took. A line of
seconds by tokens is fitted to the samples of all workers by least squares. The line predicts the seconds that a usual
worker needs, with the fixed time of an engine step, so that workers with short prompts do not look slow. Samples of
slow workers have a small weight in the fit. A worker's slowdown is a ratio: the sum of its seconds, divided by the sum
of the seconds that the line predicts. The seconds of PRIOR usual samples, at least PRIOR_S, are added to both sums. A
sample counts with at most CLIP times the seconds that the slowdown so far predicts, so that a single pause changes
little.

A prompt that is late and not yet finished shows that a worker is slow before its sample is complete. Until the prompt
is finished, it counts as a sample with the time that it has taken so far. The sums decay with each sample, so that a
few prompts show a change. They also decay with time: a worker that was slow, and therefore gets no calls, soon counts
as a usual worker again, and its next calls show whether it is one.

A ratio up to NOISE counts as 1, because the times of equal workers vary as well. A ratio from NOISE to NOISE squared
counts in part, because a jump at NOISE would drive all new calls away from a worker that is as fast as the others. A
ratio below 1 is treated like its inverse. A ratio above NOISE that comes from late prompts counts in full.

Invariants: a slowdown is within [FASTEST, SLOWEST]; it is 1 for an unknown worker. If all workers become equally
slower, the slowdowns change for a short time only.

All times are monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp
from typing import Final

MEMORY_S: Final = 15.0
"""Time in which the weight of a worker's samples falls to 1/e."""
MODEL_MEMORY_S: Final = 300.0
"""Time in which the weight of a model's samples falls to 1/e."""
KEPT: Final = 0.8
"""Factor by which the weight of a worker's samples falls with each new sample."""
PRIOR: Final = 1.0
"""Number of usual samples that are added to the samples of a worker."""
PRIOR_S: Final = 0.1
"""Minimum number of seconds that the PRIOR samples add. Short prompts take one or two engine steps, whose times vary on
equal workers."""
NOISE: Final = 1.3
"""Ratio of times, or its inverse, up to which a worker counts as a usual one."""
CLIP: Final = 4.0
"""Largest ratio of a sample's seconds to the seconds that the slowdown so far predicts."""
FASTEST, SLOWEST = 0.25, 100.0


@dataclass(slots=True)
class _Sums:
    """Sums over one worker's samples: seconds taken (`taken_s`) and seconds predicted for a usual worker (`usual_s`),
    decayed to the time `at`."""

    at: float
    taken_s: float = 0.0
    usual_s: float = 0.0
    late_tokens: int = 0
    late_s: float = 0.0
    """`late_tokens` and `late_s`: tokens of unfinished prompts, and seconds that these prompts have taken so far. Both
    count until `late_until`."""
    late_until: float = 0.0

    def decay(self, now: float) -> None:
        factor = exp(min(self.at - now, 0.0) / MEMORY_S)
        self.at, self.taken_s, self.usual_s = now, self.taken_s * factor, self.usual_s * factor


class PrefillTimes:
    """Learnt prefill times of the workers of one model: how long they need to compute prompts."""

    def __init__(self) -> None:
        self._workers: dict[str, _Sums] = {}
        self._at = 0.0
        self._count = self._tokens = self._tokens2 = self._seconds = self._products = 0.0
        """Decayed and weighted sums over all samples, as of the time `_at`: their number, tokens, squared tokens,
        seconds, and tokens times seconds."""

    def __repr__(self) -> str:
        return f"PrefillTimes({len(self._workers)} workers, {self.usual_s(1000):.4f} s for 1,000 tokens)"

    def record(self, worker_id: str, tokens: int, seconds: float, now: float) -> None:
        """Record that a worker has computed `tokens` prompt tokens in `seconds`."""
        factor = exp(min(self._at - now, 0.0) / MODEL_MEMORY_S)
        sums = self._workers.setdefault(worker_id, _Sums(now))
        sums.late_until = now
        slowdown = max(self.slowdown(worker_id, now), 1.0)
        weight = 1 / slowdown**2
        if self._seconds:  # a prompt longer than all before it may take the mean time per token
            usual_s = max(self.usual_s(tokens), self._seconds / self._tokens * tokens)
            seconds = min(seconds, CLIP * slowdown * usual_s)
        self._at = now
        self._count = self._count * factor + weight
        self._tokens = self._tokens * factor + weight * tokens
        self._tokens2 = self._tokens2 * factor + weight * tokens * tokens
        self._seconds = self._seconds * factor + weight * seconds
        self._products = self._products * factor + weight * tokens * seconds
        sums.decay(now)
        sums.taken_s = KEPT * sums.taken_s + seconds
        sums.usual_s = KEPT * sums.usual_s + self.usual_s(tokens)

    def record_unfinished(self, worker_id: str, tokens: int, seconds: float, now: float) -> None:
        """Record that a worker has worked on some prompts for `seconds` and has finished none of them. The caller does
        this when a first token is late. `tokens`: number of prompt tokens that the worker must compute for all these
        prompts.

        The record counts for the next `seconds` seconds, or until the worker's next sample or next record of unfinished
        prompts.
        """
        sums = self._workers.setdefault(worker_id, _Sums(now))
        sums.late_tokens, sums.late_s, sums.late_until = tokens, seconds, now + seconds

    def record_unfinished_lost(self, worker_id: str, now: float) -> None:
        """Record a sample for prompts that left the worker before they were finished. The sample consists of the tokens
        and seconds of the last `record_unfinished`. It overstates the worker's speed, since not all of the tokens were
        computed."""
        sums = self._workers.get(worker_id)
        if sums is not None and now < sums.late_until:
            self.record(worker_id, sums.late_tokens, sums.late_s, now)

    def usual_s(self, tokens: float) -> float:
        """Return how many seconds a usual worker needs to compute this many prompt tokens; 0 while this is unknown."""
        if not self._count:
            return 0.0
        mean_tokens, mean_s = self._tokens / self._count, self._seconds / self._count
        variance = self._tokens2 / self._count - mean_tokens * mean_tokens
        covariance = self._products / self._count - mean_tokens * mean_s
        steepest = mean_s / mean_tokens if mean_tokens else 0.0  # the line through 0: a prompt takes no negative time
        slope = min(max(covariance / variance, 0.0), steepest) if variance > 1e-6 * mean_tokens * mean_tokens else 0.0
        return max(mean_s + slope * (tokens - mean_tokens), 0.0)

    def slowdown(self, worker_id: str, now: float) -> float:
        """Return the time that a worker needs for a prompt, relative to a usual worker."""
        sums = self._workers.get(worker_id)
        if sums is None or not self._seconds:
            return 1.0
        sums.decay(now)
        prior_s = max(PRIOR * self._seconds / self._count, PRIOR_S)
        ratio = (sums.taken_s + prior_s) / (sums.usual_s + prior_s)
        shown = _without_noise(ratio) if ratio >= 1 else 1 / _without_noise(1 / ratio)
        if now < sums.late_until:
            taken_s = KEPT * sums.taken_s + sums.late_s
            usual_s = KEPT * sums.usual_s + self.usual_s(sums.late_tokens)
            late = (taken_s + prior_s) / (usual_s + prior_s)
            if late > NOISE:  # counts in whole: equal workers do not differ by as much as late prompts are late
                shown = max(shown, late)
        return min(max(shown, FASTEST), SLOWEST)

    def known(self) -> Iterable[str]:
        """Return the ids of the workers with samples."""
        return self._workers.keys()

    def forget(self, worker_id: str) -> None:
        """Forget a worker. Unknown workers are ignored."""
        self._workers.pop(worker_id, None)


def _without_noise(ratio: float) -> float:
    """Return 1 for ratios up to NOISE, and the ratio itself from NOISE squared on. In between, the result grows
    linearly. `ratio` is at least 1."""
    if ratio >= NOISE * NOISE:
        return ratio
    return max(1 + (ratio - NOISE) * (NOISE * NOISE - 1) / (NOISE * NOISE - NOISE), 1.0)
