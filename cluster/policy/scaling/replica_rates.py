"""Throughput of one replica, learnt from the durations of the steps of its engine.

Model: a step takes `fixed` seconds, plus `decode` seconds for each sequence that gets a token, plus
`prefill` seconds for each prompt token. So over a span between two reports of an engine:

    time spent in steps = fixed * steps + decode * generated tokens + prefill * prompt tokens

Method: the three costs are found by least squares over the spans of all replicas together; the weight of
older spans fades. Costs cannot be negative. So least squares is solved for each of the seven subsets of
costs, with the other costs set to 0, and the best solution without a negative cost is used.

The decode rate is extrapolated to at most BEYOND_SEEN times the observed batch, because a small batch
does not show how many streams a replica can hold.

Source: Lawson & Hanson, Solving Least Squares Problems (1974), ch. 23. All subsets are tried, because
there are so few unknowns.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.api.demand import ComputedWork
from cluster.policy.scaling.portfolio import Rates

LEAST_BUSY_S = 0.05
"""Minimum number of seconds in steps within a span. A shorter span is extended to the next report."""
FADE_S = 600.0
"""Number of seconds in steps after which the weight of a span has fallen to 1/e."""
TRUSTED_S = 2.0
"""Number of seconds in steps that must be observed before costs are returned."""
BEYOND_SEEN = 4.0


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of a replica in seconds: for each step, for each generated token and for each prompt token."""

    fixed_s: float
    decode_s: float
    prefill_s: float


@dataclass(frozen=True, slots=True)
class ReplicaLimits:
    """Upper bounds on the batch of a replica."""

    max_num_seqs: int
    max_num_batched_tokens: int
    kv_tokens: int


@dataclass(slots=True)
class LearntCosts:
    """Learnt costs of one model on one GPU type. Call `observe` once per pass, with the reports of all engines."""

    _before: dict[str, ComputedWork] = field(default_factory=dict)
    _a: list[list[float]] = field(default_factory=lambda: [[0.0] * 3 for _ in range(3)])
    _b: list[float] = field(default_factory=lambda: [0.0] * 3)
    _y: float = 0.0
    _busy_s: float = 0.0
    _prefilled: bool = False
    _batch: float = 0.0

    def observe(self, reports: Mapping[str, ComputedWork]) -> None:
        """Learn from the newest report of each engine. `reports`: the work of each engine since its start, by the
        engine's incarnation (one start of its process).

        An incarnation without a report is forgotten. The first report of a new incarnation only sets the starting
        point.
        """
        for engine, work in reports.items():
            before = self._before.get(engine)
            if before is None or work.busy_s < before.busy_s:
                self._before[engine] = work
            elif work.busy_s - before.busy_s >= LEAST_BUSY_S:
                self._before[engine] = work
                self._add(before, work)
        self._before = {engine: work for engine, work in self._before.items() if engine in reports}

    def _add(self, before: ComputedWork, work: ComputedWork) -> None:
        busy_s = work.busy_s - before.busy_s
        x = (
            float(work.steps - before.steps),
            float(work.decode_tokens - before.decode_tokens),
            float(work.prefill_tokens - before.prefill_tokens),
        )
        if x[0] <= 0:
            return
        keep, weight = max(1 - busy_s / FADE_S, 0.0), 1 / busy_s  # errors grow with the span, so long spans weigh less
        for i, j in itertools.product(range(3), repeat=2):
            self._a[i][j] = self._a[i][j] * keep + weight * x[i] * x[j]
        for i in range(3):
            self._b[i] = self._b[i] * keep + weight * x[i] * busy_s
        self._y = self._y * keep + weight * busy_s * busy_s
        self._busy_s += busy_s
        self._prefilled |= x[2] > 0
        self._batch = max(self._batch * keep, x[1] / x[0])

    def costs(self) -> Costs | None:
        """Return the learnt costs; None until steps with a total duration of TRUSTED_S seconds were observed."""
        if self._busy_s < TRUSTED_S:
            return None
        best, least = None, float("inf")
        for size in (1, 2, 3):
            for which in itertools.combinations(range(3), size):
                solution = _solve([[self._a[i][j] for j in which] for i in which], [self._b[i] for i in which])
                if solution is None or min(solution) < 0:
                    continue
                residual = self._y - sum(v * self._b[i] for v, i in zip(solution, which, strict=True))
                if residual < least - 1e-9 * self._y:
                    whole = dict(zip(which, solution, strict=True))
                    best, least = Costs(*(whole.get(i, 0.0) for i in range(3))), residual
        return best

    def rates(self, limits: ReplicaLimits, itl_s: float, gpus: int = 1) -> Rates:
        """Return the throughput of a replica, derived from the learnt costs.

        The prefill rate is for steps that are full of prompt tokens. The decode rate is for the largest batch whose
        steps take at most `itl_s` seconds. `gpus`: number of GPUs of one replica.
        """
        costs = self.costs()
        if costs is None:
            return Rates(kv_tokens=limits.kv_tokens or None, gpus=gpus)
        prefill = costs.prefill_s + costs.fixed_s / max(limits.max_num_batched_tokens, 1)
        places = _largest_batch(costs, limits, itl_s)
        return Rates(
            prefill_tokens_per_s=1 / prefill if self._prefilled and prefill > 0 else None,
            decode_tokens_per_s=self._decode(costs, places),
            kv_tokens=limits.kv_tokens or None,
            sequences=places if limits.max_num_seqs else None,
            gpus=gpus,
        )

    def _decode(self, costs: Costs, places: float) -> float | None:
        if self._batch <= 0:
            return None
        batch = min(places, max(BEYOND_SEEN * self._batch, 1.0))
        step_s = costs.fixed_s + costs.decode_s * batch
        return batch / step_s if step_s > 0 else None


def _largest_batch(costs: Costs, limits: ReplicaLimits, itl_s: float) -> float:
    """Number of sequences in the largest batch whose steps take at most `itl_s`."""
    most = float(max(limits.max_num_seqs, 1))
    if not itl_s or costs.decode_s <= 0:
        return most
    return min(most, max((itl_s - costs.fixed_s) / costs.decode_s, 1.0))


def _solve(a: list[list[float]], b: list[float]) -> list[float] | None:
    """Solve the linear equations a x = b by Gaussian elimination. Returns x, or None if the matrix is singular."""
    n = len(b)
    rows = [[*a[i], b[i]] for i in range(n)]
    for i in range(n):
        pivot = max(range(i, n), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        if abs(rows[i][i]) <= 1e-9 * max(a[i][i], 1e-300):
            return None
        for r in range(i + 1, n):
            factor = rows[r][i] / rows[i][i]
            rows[r] = [x - factor * y for x, y in zip(rows[r], rows[i], strict=True)]
    x = [0.0] * n
    for i in reversed(range(n)):
        x[i] = (rows[i][n] - sum(rows[i][j] * x[j] for j in range(i + 1, n))) / rows[i][i]
    return x
