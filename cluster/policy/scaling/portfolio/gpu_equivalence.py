"""Conversion of replicas on several types of GPU to replicas of one type.

Problem: the need of a model is one number, but replicas on different types of GPU have different throughput.

Method: everything is counted in replicas on one type of GPU, the unit type. It is the most preferred type whose rates
are learnt. The worth of a replica on another type is the number of replicas on the unit type that it replaces. The
worth is the lesser of two ratios: the other type's prefill rate divided by that of the unit type, and the other type's
decode rate divided by that of the unit type. So a mix of types is never overestimated, whatever the calls are like. A
type whose rates are not learnt has the worth 1.

Invariant: with one type of GPU, every number is a plain number of replicas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from cluster.policy.scaling.portfolio.types import ModelSeen, Rates, ReplicaSeen

_LITTLE = 1e-6


def unit_of(seen: ModelSeen) -> str:
    """Return the unit type: the GPU type in which a model's replicas are counted. It is the most preferred type with
    learnt rates or, if no rates are learnt, the first type."""
    return next((gpu for gpu in seen.settings.gpus if _learnt(seen.rates.get(gpu, Rates()))), seen.settings.gpus[0])


def replica_worth(seen: ModelSeen, gpu: str) -> float:
    """Return the worth of one replica on the GPU type `gpu`: how many replicas on the unit type it replaces. The unit
    type is the most preferred GPU type with learnt rates."""
    if len(seen.settings.gpus) == 1:
        return 1.0
    rates, unit = seen.rates.get(gpu, Rates()), seen.rates.get(unit_of(seen), Rates())
    if not (rates.prefill_tokens_per_s and rates.decode_tokens_per_s):
        return 1.0
    if not (unit.prefill_tokens_per_s and unit.decode_tokens_per_s):
        return 1.0
    prefill = rates.prefill_tokens_per_s / unit.prefill_tokens_per_s
    return min(prefill, rates.decode_tokens_per_s / unit.decode_tokens_per_s)


def total_worth(seen: ModelSeen, counts: Mapping[str, int]) -> float:
    """Convert replicas on several GPU types to one number: the number of replicas on the unit type (one reference GPU
    type) that could do the same work. `counts`: number of replicas by GPU type."""
    return math.fsum(count * replica_worth(seen, gpu) for gpu, count in counts.items())


def round_up(replicas: float) -> int:
    """Round a number of replicas up, with a tolerance for floating-point error."""
    return math.ceil(replicas - _LITTLE)


def covers(replicas: float, wanted: int) -> bool:
    """Return whether `replicas` is at least `wanted`, with a tolerance for floating-point error. Both are numbers of
    replicas on one GPU type, the unit type."""
    return replicas >= wanted - _LITTLE


def as_one_type(seen: ModelSeen) -> ModelSeen:
    """Return the model as if all its replicas were on one GPU type, the unit type (`unit_of`).

    The starting and ready replicas are replaced by replicas of the unit type. The number of the new replicas is the
    total worth (`replica_worth`) of the replaced replicas, rounded up. The number of ready ones among them is the total
    worth of the replaced ready replicas, rounded down, but at least 1 if any replica was ready; if all replicas were
    ready, all new replicas are ready. Draining replicas stay unchanged.
    """
    if len(seen.settings.gpus) == 1:
        return seen
    unit = unit_of(seen)
    there = [replica for replica in seen.replicas if replica.state != "draining"]
    ready = [replica for replica in there if replica.state == "ready"]
    have = round_up(sum(replica_worth(seen, replica.gpu) for replica in there))
    serve = math.floor(sum(replica_worth(seen, replica.gpu) for replica in ready) + _LITTLE)
    if ready:
        serve = max(serve, 1)
    if len(ready) == len(there):
        serve = have
    since_s = min((replica.since_s for replica in there), default=0.0)
    counted = [ReplicaSeen(f"{unit}-{n}", "ready" if n < serve else "starting", since_s, unit) for n in range(have)]
    return replace(
        seen,
        settings=replace(seen.settings, gpus=(unit,)),
        replicas=[*counted, *(replica for replica in seen.replicas if replica.state == "draining")],
    )


def _learnt(rates: Rates) -> bool:
    return bool(rates.prefill_tokens_per_s and rates.decode_tokens_per_s)
