"""GPUs shared between models: first what is fixed and the least of each, then replica by replica to who gains most.

Problem: wishes may exceed the GPUs. Each further replica of a model serves a further piece of its load, pieces of
higher classes first, and the last ones are margin that is seldom used: gains fall from one to the next, so the greedy
choice by gain per GPU is the best one for replicas of one size (a sum of concave functions under one knapsack
constraint). A class counts `CLASS` times the one below. A replica that is there has an edge over one that would have
to be started, so that two models of like gain do not take GPUs from each other in turns.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.control.scaling.types import Decision, ModelSeen, Rates
from cluster.control.scaling.worth import covers, unit_of, whole, worth, worth_of

CLASS = 100.0
DEEPEST = 6
"""Classes further down count alike."""
EDGE = 2.0
LEAST_GAIN = 1e-30
"""Below what any class counts, so that a wish without load still has an order."""
MARGIN_USE = 0.2
"""How often the first replica beyond the expected load is used, against one within it."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What one model asks for. `fixed`: what it gets whatever it wishes; `frozen`: also beyond the budget. `wanted` and
    `load` are in replicas of one type (worth.py), all else in replicas as they are."""

    model: str
    seen: ModelSeen
    have: Mapping[str, int]
    wanted: int
    floor: int
    load: float
    by_rank: Mapping[int, float]
    calls_per_s: float
    fixed: int | Mapping[str, int] | None
    frozen: bool
    why: str
    numbers: Mapping[str, float]


class _Purse:
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


def share(claims: Sequence[Claim], budget: Mapping[str, int]) -> tuple[Decision, ...]:
    """A decision for every claim, in their order; never more of a GPU type than there is, but for what is frozen."""
    purse = _Purse(budget)
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
    for claim in sorted(free, key=lambda c: -_gain(c, 1)):
        for _ in range(claim.floor):
            _take(purse, claim, given[claim.model])
    heap = [(-_value(claim, given[claim.model]), at) for at, claim in enumerate(free)]
    heapq.heapify(heap)
    while heap:
        _, at = heapq.heappop(heap)
        claim = free[at]
        mine = given[claim.model]
        if not _enough(claim, mine) and _take(purse, claim, mine):
            heapq.heappush(heap, (-_value(claim, mine), at))
    return tuple(_decision(claim, given[claim.model]) for claim in claims)


def _enough(claim: Claim, mine: Mapping[str, int]) -> bool:
    """Whether they are worth what is wanted, or as many as there may be."""
    settings = claim.seen.settings
    if len(settings.gpus) > 1 and sum(mine.values()) >= settings.max_replicas:
        return True
    return covers(worth_of(claim.seen, mine), claim.wanted)


def _take(purse: _Purse, claim: Claim, mine: dict[str, int]) -> bool:
    """One more replica: of a type that the model has already, else of the first that has room, else of the first."""
    types, room = claim.seen.settings.gpus, claim.seen.room
    kept = [gpu for gpu in types if mine.get(gpu, 0) < claim.have.get(gpu, 0)]
    free = [gpu for gpu in (*kept, *types) if gpu not in room or mine.get(gpu, 0) < room[gpu]]
    for gpu in (*free, types[0]):
        if purse.take(gpu, _gpus(claim, gpu)):
            mine[gpu] = mine.get(gpu, 0) + 1
            return True
    return False


def _gpus(claim: Claim, gpu: str) -> int:
    return claim.seen.rates.get(gpu, Rates()).gpus


def _value(claim: Claim, mine: Mapping[str, int]) -> float:
    """Of the next replica, for each GPU."""
    number = worth_of(claim.seen, mine) + 1
    edge = EDGE if covers(worth_of(claim.seen, claim.have), whole(number)) else 1.0
    return edge * _gain(claim, number) / max(_gpus(claim, unit_of(claim.seen)), 1)


def _gain(claim: Claim, number: float) -> float:
    """Calls a second that the replica of this number serves in time, by class."""
    total = sum(claim.by_rank.values())
    if total <= 0 or claim.load <= 0:
        return LEAST_GAIN
    gain, before = 0.0, 0.0
    scale = max(claim.load, total) / total
    for rank in sorted(claim.by_rank):
        load = claim.by_rank[rank] * scale
        here = max(min(number, before + load) - max(number - 1, before), 0.0)
        gain += here / max(claim.load, total) * claim.calls_per_s * CLASS ** -min(rank, DEEPEST)
        before += load
    beyond = max(number - max(before, number - 1), 0.0)
    if beyond > 0:
        first = min(claim.by_rank)
        use = MARGIN_USE * math.exp(-max(number - 1 - before, 0.0) / max(before, 1.0) * 4)
        gain += beyond * use / max(before, 1.0) * claim.calls_per_s * CLASS ** -min(first, DEEPEST)
    return gain + LEAST_GAIN


def _decision(claim: Claim, got: Mapping[str, int]) -> Decision:
    counts = {gpu: count for gpu, count in got.items() if count or claim.have.get(gpu)}
    total, why = worth_of(claim.seen, got), claim.why
    asked, less = claim.wanted, not _enough(claim, got)
    if claim.fixed is not None:
        asked = claim.fixed if isinstance(claim.fixed, int) else sum(claim.fixed.values())
        total = float(sum(got.values()))
        less = total < asked
    if less:
        why = f"{why}; the GPU budget allows {total:.3g} of {asked}"
    numbers = {**claim.numbers, "wanted": float(asked), "given": total, "gain": _gain(claim, max(total, 1.0))}
    if len(claim.seen.settings.gpus) > 1:
        numbers |= {f"given[{gpu}]": float(count) for gpu, count in counts.items()}
        numbers |= {f"worth[{gpu}]": worth(claim.seen, gpu) for gpu in claim.seen.settings.gpus}
    return Decision(claim.model, counts, why, numbers)
