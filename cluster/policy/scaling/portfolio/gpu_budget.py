"""Distribution of GPUs over models. Fixed numbers and minimums come first. The rest goes to the models that gain the
most timely calls (calls that are not late) per GPU.

Problem: the replica targets may need more GPUs than there are. Timely calls as a function of replicas
(marginal_gain.py) form an S-curve. With fewer replicas than a model's load needs, hardly any call is timely; then the
curve is steep, then flat. A greedy choice of single replicas would stop at the flat beginning of the curve.

Method: a model gets replicas in steps, each of one replica or several. The size of a step is the one that gains most
per GPU, so the steps follow the upper concave hull of the model's curve. On the hull, the gain per GPU falls from step
to step. So taking the step with the greatest gain first is optimal, except for the last step, which may not fit into
the budget (a sum of concave functions under one knapsack constraint).

Calls of a priority class count `CLASS` times as much as calls of the class below. A new replica gains nothing during
its cold start, and queued work delays the gain. The gain of a running replica is multiplied by `EDGE`, so that two
models of similar gain do not take GPUs from each other in turns.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.policy.scaling.portfolio.forecast import Floats
from cluster.policy.scaling.portfolio.gpu_equivalence import covers, replica_worth, round_up, total_worth, unit_of
from cluster.policy.scaling.portfolio.marginal_gain import MarginalGains
from cluster.policy.scaling.portfolio.types import ModelSeen, Rates, ReplicaDecision

CLASS = 100.0
DEEPEST = 6
"""Position in the order of classes (0 for the highest) from which on all classes count alike."""
EDGE = 1.3
HORIZON = 5.0
"""Time over which the gain of a choice is counted, in cold starts."""
CLEARED = 30.0
"""Time in cold starts: replicas that need this time to work off the queue count with half their gain."""
KNOWN = 1.0
"""Weight of the gain that is guessed from the mean load. A cold start of replayed demand has the weight 1."""
LEAST_GAIN = 1e-30
"""Gain per replica that is added for every model. It is below the gain of any class and matters only without load."""


@dataclass(frozen=True, slots=True)
class GpuClaim:
    """The replicas that one model asks for, with the values by which GPUs are distributed.

    `fixed`: number of replicas in place of the target, in total or by GPU type; None: the target decides. If `frozen`
    is set, the model gets `fixed` even beyond the budget. `wanted` and `load` are in replicas of one type
    (gpu_equivalence.py); all other numbers are in real replicas.
    """

    model: str
    seen: ModelSeen
    have: Mapping[str, int]
    wanted: int
    floor: int
    load: float
    waiting_s: float
    """Queued work in replica-seconds."""
    by_rank: Mapping[int, float]
    calls_per_s: float
    gains: MarginalGains
    fixed: int | Mapping[str, int] | None
    frozen: bool
    why: str
    numbers: Mapping[str, float]


class _GpuPool:
    """GPUs of each type that are not given to a model yet. A type without a budget is unlimited."""

    def __init__(self, budget: Mapping[str, int]) -> None:
        self.free = dict(budget)

    def acquire(self, gpu: str, gpus: int) -> bool:
        if gpu not in self.free:
            return True
        if self.free[gpu] < gpus:
            return False
        self.free[gpu] -= gpus
        return True

    def release(self, gpu: str, gpus: int) -> None:
        if gpu in self.free:
            self.free[gpu] += gpus


def share(claims: Sequence[GpuClaim], budget: Mapping[str, int]) -> tuple[ReplicaDecision, ...]:
    """Decide the number of replicas for every claim. Returns the decisions in the order of the claims.

    `budget`: number of GPUs by type; a type without an entry is unlimited. Only claims with `frozen` set may exceed
    the budget.
    """
    pool = _GpuPool(budget)
    # Classes count by their order, not by their rank numbers, so that unranked classes are equal and not worthless.
    order = {rank: depth for depth, rank in enumerate(sorted({rank for claim in claims for rank in claim.by_rank}))}
    claims = [replace(claim, by_rank={order[r]: load for r, load in claim.by_rank.items()}) for claim in claims]
    given: dict[str, dict[str, int]] = {}
    for claim in claims:
        if claim.frozen and isinstance(claim.fixed, Mapping):
            given[claim.model] = dict(claim.fixed)
            for gpu, count in claim.fixed.items():
                if gpu in pool.free:
                    pool.free[gpu] = max(pool.free[gpu] - count * _gpus(claim, gpu), 0)
    for claim in claims:
        if isinstance(claim.fixed, int):
            given[claim.model] = {}
            for _ in range(claim.fixed):
                _add_replica(pool, claim, given[claim.model])
        elif claim.fixed is not None and not claim.frozen:
            given[claim.model] = {}
            for gpu, count in claim.fixed.items():
                got = sum(pool.acquire(gpu, _gpus(claim, gpu)) for _ in range(count))
                given[claim.model][gpu] = got
    free = [claim for claim in claims if claim.fixed is None]
    for claim in free:
        given[claim.model] = {}
    for claim in sorted(free, key=lambda c: -float(_weighted_gain(c, np.ones(1))[0])):
        for _ in range(claim.floor):
            _add_replica(pool, claim, given[claim.model])
    values = [_values(claim) for claim in free]
    heap: list[tuple[float, int, int, int]] = []
    for at, claim in enumerate(free):
        _push_step(heap, at, claim, given[claim.model], values[at], claim.wanted)
    while heap:
        _, at, number, most = heapq.heappop(heap)
        claim = free[at]
        mine = dict(given[claim.model])
        added = True
        while added and not _is_satisfied(claim, mine) and not covers(total_worth(claim.seen, mine), number):
            added = _add_replica(pool, claim, mine)
        fits = round_up(total_worth(claim.seen, mine))
        if added or fits >= number:
            given[claim.model] = mine
            _push_step(heap, at, claim, mine, values[at], most if added else 0)
            continue
        # The step does not fit as a whole. The part of the step that fits may gain little, so other claims come first.
        for gpu, count in mine.items():
            pool.release(gpu, (count - given[claim.model].get(gpu, 0)) * _gpus(claim, gpu))
        _push_step(heap, at, claim, given[claim.model], values[at], fits)
    return tuple(_decision(claim, given[claim.model]) for claim in claims)


def _is_satisfied(claim: GpuClaim, mine: Mapping[str, int]) -> bool:
    """Return whether a model needs no more replicas. `mine`: number of its replicas on each GPU type.

    The model needs no more if these replicas do the work of `claim.wanted` replicas of one type (gpu_equivalence.py). A
    model that may use several GPU types also needs no more if it has its maximum number of replicas.
    """
    settings = claim.seen.settings
    if len(settings.gpus) > 1 and sum(mine.values()) >= settings.max_replicas:
        return True
    return covers(total_worth(claim.seen, mine), claim.wanted)


def _add_replica(pool: _GpuPool, claim: GpuClaim, mine: dict[str, int]) -> bool:
    """Add one replica to `mine`, the planned replicas of the claim's model by GPU type. Returns False if the
    budget has no GPUs for a replica.

    The replica gets the first GPU type for which the budget suffices, in this order:
    1. types on which the model has more replicas now than planned in `mine`, if Ray can place one more replica
    2. any other type, if Ray can place one more replica
    3. the model's first type, even if Ray cannot place a replica
    """
    types, room = claim.seen.settings.gpus, claim.seen.room
    kept = [gpu for gpu in types if mine.get(gpu, 0) < claim.have.get(gpu, 0)]
    free = [gpu for gpu in (*kept, *types) if gpu not in room or mine.get(gpu, 0) < room[gpu]]
    for gpu in (*free, types[0]):
        if pool.acquire(gpu, _gpus(claim, gpu)):
            mine[gpu] = mine.get(gpu, 0) + 1
            return True
    return False


def _gpus(claim: GpuClaim, gpu: str) -> int:
    return claim.seen.rates.get(gpu, Rates()).gpus


def _push_step(
    heap: list[tuple[float, int, int, int]],
    at: int,
    claim: GpuClaim,
    mine: Mapping[str, int],
    values: Floats,
    most: int,
) -> None:
    """Find the number of replicas at which the claim gains most per additional GPU, and push this step onto the heap.
    Nothing is pushed if the claim needs no more. `at`: the claim's index, stored on the heap. `mine`: replicas that the
    claim has so far. `values`: the claim's value for each number of replicas. `most`: largest number of replicas after
    the step."""
    here = total_worth(claim.seen, mine)
    first = math.floor(here + 1e-6) + 1
    if _is_satisfied(claim, mine) or most < first:
        return
    numbers = np.arange(first, most + 1)
    each = (values[first : most + 1] - np.interp(here, np.arange(len(values)), values)) / (numbers - here)
    best = int(np.argmax(each))
    gpus = max(_gpus(claim, unit_of(claim.seen)), 1)
    heapq.heappush(heap, (-float(each[best]) / gpus, at, first + best, most))


def _values(claim: GpuClaim) -> Floats:
    """Return an array: element n is the value of n replicas. The value is the number of calls per second that they
    serve in time, weighted by class, as a mean over HORIZON. The value of replicas that run already is multiplied by
    EDGE, so that no replica is replaced for a small gain."""
    have = total_worth(claim.seen, claim.have)
    numbers = np.arange(claim.wanted + 1, dtype=float)
    kept = np.minimum(numbers, have)
    there = _weighted_gain(claim, kept)
    values: Floats = EDGE * there + (_weighted_gain(claim, numbers) - there) * (HORIZON - 1.0) / HORIZON
    return values


def _weighted_gain(claim: GpuClaim, numbers: Floats) -> Floats:
    """Return the number of timely calls (calls that are not late) per second, weighted by class, for each number of
    replicas in `numbers`."""
    total = sum(claim.by_rank.values())
    out, before, share = LEAST_GAIN * numbers, np.zeros(len(numbers)), 0.0
    for rank in sorted(claim.by_rank):
        share += claim.by_rank[rank] / total if total > 0 else 1.0
        won = share * _in_time(claim, numbers / max(share, 1e-9))
        out = out + np.maximum(won - before, 0.0) * CLASS ** -min(rank, DEEPEST)
        before = won
    return out


def _in_time(claim: GpuClaim, numbers: Floats) -> Floats:
    """Return the expected calls per second that meet their SLO, for each number of replicas in `numbers`. Queued work
    reduces the result."""
    cold_s = max(claim.seen.settings.cold_start_s, 1.0)
    seen = claim.gains.time_s / cold_s
    guess = claim.calls_per_s * np.minimum(numbers / claim.load, 1.0) if claim.load > 0 else np.zeros(len(numbers))
    won: Floats = (guess * KNOWN + claim.gains.per_s(numbers) * seen) / (KNOWN + seen)
    spare = np.maximum(numbers - claim.load, 1e-3)
    return won / (1.0 + claim.waiting_s / spare / (CLEARED * cold_s))


def _decision(claim: GpuClaim, got: Mapping[str, int]) -> ReplicaDecision:
    counts = {gpu: count for gpu, count in got.items() if count or claim.have.get(gpu)}
    total, why = total_worth(claim.seen, got), claim.why
    asked, less = claim.wanted, not _is_satisfied(claim, got)
    if claim.fixed is not None:
        asked = claim.fixed if isinstance(claim.fixed, int) else sum(claim.fixed.values())
        total = float(sum(got.values()))
        less = total < asked
    if less:
        why = f"{why}; the GPU budget allows {total:.3g} of {asked}"
    numbers = {
        **claim.numbers,
        "wanted": float(asked),
        "given": total,
        "gain": float(_weighted_gain(claim, np.array([max(total, 1.0)]))[0]),
    }
    if len(claim.seen.settings.gpus) > 1:
        numbers |= {f"given[{gpu}]": float(count) for gpu, count in counts.items()}
        numbers |= {f"worth[{gpu}]": replica_worth(claim.seen, gpu) for gpu in claim.seen.settings.gpus}
    return ReplicaDecision(claim.model, counts, why, numbers)
