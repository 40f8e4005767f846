"""GPUs shared between models: first what is fixed and the least of each, then to who gains most calls in time by GPU.

Problem: wishes may exceed the GPUs. What a number of replicas wins (marginal_gain.py) rises slowly at first, for a
model with less than its load serves nobody in time, then steeply, then hardly any more. Greedy by the next replica
would stop at the foot of the slope, so steps are taken along the upper concave hull: as many replicas at once as gain
most for each GPU. On the hull gains fall from one step to the next, so greedy is the best choice up to the last step (a
sum of concave functions under one knapsack constraint). A class counts `CLASS` times the one below. A replica that
would have to be started wins nothing till it serves, and work that waits has to be done before calls are in time again;
a replica that is there has an edge besides, so that two models of like gain do not take GPUs from each other in turns.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.policy.scaling.portfolio.forecast import Floats
from cluster.policy.scaling.portfolio.gpu_equivalence import covers, unit_of, whole, worth, worth_of
from cluster.policy.scaling.portfolio.marginal_gain import MarginalGains
from cluster.policy.scaling.portfolio.types import ModelSeen, Rates, ReplicaDecision

CLASS = 100.0
DEEPEST = 6
"""Classes further down count alike."""
EDGE = 1.3
HORIZON = 5.0
"""Cold starts for which a choice is made."""
CLEARED = 30.0
"""Cold starts in which what waits may be done at half the gain."""
KNOWN = 1.0
"""Cold starts of demand that count as much as the guess from the mean load."""
LEAST_GAIN = 1e-30
"""Below what any class counts, so that a wish without load still has an order."""


@dataclass(frozen=True, slots=True)
class GpuClaim:
    """What one model asks for. `fixed`: what it gets whatever it wishes; `frozen`: also beyond the budget. `wanted` and
    `load` are in replicas of one type (gpu_equivalence.py), all else in replicas as they are."""

    model: str
    seen: ModelSeen
    have: Mapping[str, int]
    wanted: int
    floor: int
    load: float
    waiting_s: float
    """Replica-seconds of what waits."""
    by_rank: Mapping[int, float]
    calls_per_s: float
    gains: MarginalGains
    fixed: int | Mapping[str, int] | None
    frozen: bool
    why: str
    numbers: Mapping[str, float]


class _GpuPool:
    """What is left of each GPU type."""

    def __init__(self, budget: Mapping[str, int]) -> None:
        self.left = dict(budget)

    def take(self, gpu: str, gpus: int) -> bool:
        if gpu not in self.left:
            return True
        if self.left[gpu] < gpus:
            return False
        self.left[gpu] -= gpus
        return True

    def give(self, gpu: str, gpus: int) -> None:
        if gpu in self.left:
            self.left[gpu] += gpus


def share(claims: Sequence[GpuClaim], budget: Mapping[str, int]) -> tuple[ReplicaDecision, ...]:
    """A decision for every claim, in their order; never more of a GPU type than there is, but for what is frozen."""
    purse = _GpuPool(budget)
    # Classes count by their order, not by their numbers: classes that nobody has ranked are alike, not worthless.
    order = {rank: depth for depth, rank in enumerate(sorted({rank for claim in claims for rank in claim.by_rank}))}
    claims = [replace(claim, by_rank={order[r]: load for r, load in claim.by_rank.items()}) for claim in claims]
    given: dict[str, dict[str, int]] = {}
    for claim in claims:
        if claim.frozen and isinstance(claim.fixed, Mapping):
            given[claim.model] = dict(claim.fixed)
            for gpu, count in claim.fixed.items():
                if gpu in purse.left:
                    purse.left[gpu] = max(purse.left[gpu] - count * _gpus(claim, gpu), 0)
    for claim in claims:
        if isinstance(claim.fixed, int):
            given[claim.model] = {}
            for _ in range(claim.fixed):
                _take(purse, claim, given[claim.model])
        elif claim.fixed is not None and not claim.frozen:
            given[claim.model] = {}
            for gpu, count in claim.fixed.items():
                got = sum(purse.take(gpu, _gpus(claim, gpu)) for _ in range(count))
                given[claim.model][gpu] = got
    free = [claim for claim in claims if claim.fixed is None]
    for claim in free:
        given[claim.model] = {}
    for claim in sorted(free, key=lambda c: -float(_won(c, np.ones(1))[0])):
        for _ in range(claim.floor):
            _take(purse, claim, given[claim.model])
    values = [_values(claim) for claim in free]
    heap: list[tuple[float, int, int, int]] = []
    for at, claim in enumerate(free):
        _push(heap, at, claim, given[claim.model], values[at], claim.wanted)
    while heap:
        _, at, number, most = heapq.heappop(heap)
        claim = free[at]
        mine = dict(given[claim.model])
        took = True
        while took and not _enough(claim, mine) and not covers(worth_of(claim.seen, mine), number):
            took = _take(purse, claim, mine)
        fits = whole(worth_of(claim.seen, mine))
        if took or fits >= number:
            given[claim.model] = mine
            _push(heap, at, claim, mine, values[at], most if took else 0)
            continue
        # A step that does not fit as a whole: what fits may win little, and others come first.
        for gpu, count in mine.items():
            purse.give(gpu, (count - given[claim.model].get(gpu, 0)) * _gpus(claim, gpu))
        _push(heap, at, claim, given[claim.model], values[at], fits)
    return tuple(_decision(claim, given[claim.model]) for claim in claims)


def _enough(claim: GpuClaim, mine: Mapping[str, int]) -> bool:
    """Whether they are worth what is wanted, or as many as there may be."""
    settings = claim.seen.settings
    if len(settings.gpus) > 1 and sum(mine.values()) >= settings.max_replicas:
        return True
    return covers(worth_of(claim.seen, mine), claim.wanted)


def _take(purse: _GpuPool, claim: GpuClaim, mine: dict[str, int]) -> bool:
    """One more replica: of a type that the model has already, else of the first that has room, else of the first."""
    types, room = claim.seen.settings.gpus, claim.seen.room
    kept = [gpu for gpu in types if mine.get(gpu, 0) < claim.have.get(gpu, 0)]
    free = [gpu for gpu in (*kept, *types) if gpu not in room or mine.get(gpu, 0) < room[gpu]]
    for gpu in (*free, types[0]):
        if purse.take(gpu, _gpus(claim, gpu)):
            mine[gpu] = mine.get(gpu, 0) + 1
            return True
    return False


def _gpus(claim: GpuClaim, gpu: str) -> int:
    return claim.seen.rates.get(gpu, Rates()).gpus


def _push(
    heap: list[tuple[float, int, int, int]],
    at: int,
    claim: GpuClaim,
    mine: Mapping[str, int],
    values: Floats,
    most: int,
) -> None:
    """The next step of a claim, to `most` at the furthest: to where it gains most for each GPU."""
    here = worth_of(claim.seen, mine)
    first = math.floor(here + 1e-6) + 1
    if _enough(claim, mine) or most < first:
        return
    numbers = np.arange(first, most + 1)
    each = (values[first : most + 1] - np.interp(here, np.arange(len(values)), values)) / (numbers - here)
    best = int(np.argmax(each))
    gpus = max(_gpus(claim, unit_of(claim.seen)), 1)
    heapq.heappush(heap, (-float(each[best]) / gpus, at, first + best, most))


def _values(claim: GpuClaim) -> Floats:
    """By 0, 1, 2, ... replicas: calls in time a second over the horizon, with the edge of what is there."""
    have = worth_of(claim.seen, claim.have)
    numbers = np.arange(claim.wanted + 1, dtype=float)
    kept = np.minimum(numbers, have)
    there = _won(claim, kept)
    values: Floats = EDGE * there + (_won(claim, numbers) - there) * (HORIZON - 1.0) / HORIZON
    return values


def _won(claim: GpuClaim, numbers: Floats) -> Floats:
    """Calls in time a second by so many replicas, by class."""
    total = sum(claim.by_rank.values())
    out, before, share = LEAST_GAIN * numbers, np.zeros(len(numbers)), 0.0
    for rank in sorted(claim.by_rank):
        share += claim.by_rank[rank] / total if total > 0 else 1.0
        won = share * _in_time(claim, numbers / max(share, 1e-9))
        out = out + np.maximum(won - before, 0.0) * CLASS ** -min(rank, DEEPEST)
        before = won
    return out


def _in_time(claim: GpuClaim, numbers: Floats) -> Floats:
    """Of all classes as one, once what waits is done."""
    cold_s = max(claim.seen.settings.cold_start_s, 1.0)
    seen = claim.gains.time_s / cold_s
    guess = claim.calls_per_s * np.minimum(numbers / claim.load, 1.0) if claim.load > 0 else np.zeros(len(numbers))
    won: Floats = (guess * KNOWN + claim.gains.per_s(numbers) * seen) / (KNOWN + seen)
    spare = np.maximum(numbers - claim.load, 1e-3)
    return won / (1.0 + claim.waiting_s / spare / (CLEARED * cold_s))


def _decision(claim: GpuClaim, got: Mapping[str, int]) -> ReplicaDecision:
    counts = {gpu: count for gpu, count in got.items() if count or claim.have.get(gpu)}
    total, why = worth_of(claim.seen, got), claim.why
    asked, less = claim.wanted, not _enough(claim, got)
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
        "gain": float(_won(claim, np.array([max(total, 1.0)]))[0]),
    }
    if len(claim.seen.settings.gpus) > 1:
        numbers |= {f"given[{gpu}]": float(count) for gpu, count in counts.items()}
        numbers |= {f"worth[{gpu}]": worth(claim.seen, gpu) for gpu in claim.seen.settings.gpus}
    return ReplicaDecision(claim.model, counts, why, numbers)
