"""Learnt times to the first token, by model and by the number of prompt tokens that the worker has to compute.

Problem: a first token counts as late after a time that only 1 % of the calls on an ordinary worker exceed. Slow workers
must not raise this time, since their calls must still count as late.

Method: the workers of a model are spread over GROUPS groups. Each group has a sketch (latency_sketch.py) for each size
class of prompts, from which a high quantile is read. The result is the lower median of these quantiles, so slow workers
in a minority of the groups do not change it. A size class with too few observations uses the next larger class, whose
first tokens come later.

Invariant: memory is bounded, in models, in workers per model and in observations.

Source: the median of groups as a robust estimate is median-of-means (Nemirovsky, Yudin, 1983), with a quantile in place
of the mean.
"""

from __future__ import annotations

from collections import OrderedDict

from cluster.policy.scheduling.latency_sketch import LatencySketch

QUANTILE = 0.99
GROUPS = 7
HALF_LIFE_S = 600.0
MIN_COUNT = 50.0
"""Number of observations from which a group's quantile counts."""
RELEARNT_S = 1.0
"""Age in seconds at which the time for a size class is computed anew."""
SIZES = 24
"""Number of size classes: class i has the prompts of 2**(i - 1) to 2**i - 1 tokens; the last class also has all longer
prompts."""
MAX_MODELS = 1_000
MAX_WORKERS = 4_096
"""Largest number of workers of a model whose groups are remembered. Beyond it, all workers are assigned to groups
anew."""


def size_class(uncached_tokens: int) -> int:
    """Return the size class of a prompt, from 1 to SIZES. `uncached_tokens`: number of prompt tokens to compute."""
    return min(max(uncached_tokens, 1).bit_length(), SIZES)


class _Model:
    __slots__ = ("_groups", "_known", "_sketches")

    def __init__(self) -> None:
        self._groups: dict[str, int] = {}
        self._sketches: dict[tuple[int, int], LatencySketch] = {}
        self._known: dict[int, tuple[float, float | None]] = {}

    def observe(self, worker: str, size: int, duration_s: float, now: float) -> None:
        group = self._groups.get(worker)
        if group is None:
            if len(self._groups) >= MAX_WORKERS:
                self._groups.clear()
            group = self._groups[worker] = len(self._groups) % GROUPS
        sketch = self._sketches.get((size, group))
        if sketch is None:
            sketch = self._sketches[size, group] = LatencySketch(HALF_LIFE_S)
        sketch.add(duration_s, now)

    def high(self, size: int, now: float) -> float | None:
        known = self._known.get(size)
        if known is None or not known[0] <= now < known[0] + RELEARNT_S:
            known = self._known[size] = (now, self._learn(size, now))
        return known[1]

    def _learn(self, size: int, now: float) -> float | None:
        for larger in range(size, SIZES + 1):
            sketches = (self._sketches.get((larger, group)) for group in range(GROUPS))
            highs = sorted(s.quantile(QUANTILE) for s in sketches if s is not None and s.count(now) >= MIN_COUNT)
            if highs:
                return highs[(len(highs) - 1) // 2]
        return None


class FirstTokenTimes:
    """Times to the first token that one gateway has observed. Each time runs from the Submit request to the first
    output. `now` is monotonic, in seconds."""

    def __init__(self) -> None:
        self._models: OrderedDict[str, _Model] = OrderedDict()

    def observe(self, model: str, worker: str, uncached_tokens: int, duration_s: float, now: float) -> None:
        """Record that a worker's first token came after `duration_s` seconds. `uncached_tokens`: number of prompt
        tokens that the worker computed."""
        known = self._models.get(model)
        if known is None:
            known = self._models[model] = _Model()
            if len(self._models) > MAX_MODELS:
                self._models.popitem(last=False)
        known.observe(worker, size_class(uncached_tokens), duration_s, now)

    def high(self, model: str, uncached_tokens: int, now: float) -> float | None:
        """Return how many seconds after a Submit a missing first token counts as late. None if too few times to first
        token were observed. `uncached_tokens`: number of prompt tokens that the worker has to compute."""
        known = self._models.get(model)
        return None if known is None else known.high(size_class(uncached_tokens), now)

    def __repr__(self) -> str:
        return f"FirstTokenTimes({len(self._models)} models)"
