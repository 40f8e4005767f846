"""Replicas on several types of GPU counted as so many of one type.

Problem: what a model needs is one number, and a replica does not do the same on every type. Everything is therefore
counted in replicas of one type, the unit: the first choice whose rates are learnt. A replica of another type is worth
the lesser of what it prefills and what it decodes against the unit's, so that a mix is never counted for more than it
can do, whatever the calls are like; one whose rates are not learnt is taken to be like the unit.
Invariant: with one type every number is that of the replicas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from cluster.policy.scaling.portfolio.types import ModelSeen, Rates, ReplicaSeen

_LITTLE = 1e-6


def unit_of(seen: ModelSeen) -> str:
    """The type in whose replicas the model's are counted; the first where no rates are learnt."""
    return next((gpu for gpu in seen.settings.gpus if _learnt(seen.rates.get(gpu, Rates()))), seen.settings.gpus[0])


def worth(seen: ModelSeen, gpu: str) -> float:
    """What a replica of this type is worth."""
    if len(seen.settings.gpus) == 1:
        return 1.0
    one, unit = seen.rates.get(gpu, Rates()), seen.rates.get(unit_of(seen), Rates())
    if not (one.prefill_tokens_per_s and one.decode_tokens_per_s):
        return 1.0
    if not (unit.prefill_tokens_per_s and unit.decode_tokens_per_s):
        return 1.0
    prefill = one.prefill_tokens_per_s / unit.prefill_tokens_per_s
    return min(prefill, one.decode_tokens_per_s / unit.decode_tokens_per_s)


def worth_of(seen: ModelSeen, counts: Mapping[str, int]) -> float:
    """Of so many by type."""
    return math.fsum(count * worth(seen, gpu) for gpu, count in counts.items())


def whole(replicas: float) -> int:
    """The replicas of the unit that are at least as many."""
    return math.ceil(replicas - _LITTLE)


def covers(replicas: float, wanted: int) -> bool:
    """Whether they are worth as many as are wanted."""
    return replicas >= wanted - _LITTLE


def as_one_type(seen: ModelSeen) -> ModelSeen:
    """The same model as if all of its replicas were of the unit: as many as they are worth, and as many of them ready
    as those that are ready are worth at least."""
    if len(seen.settings.gpus) == 1:
        return seen
    unit = unit_of(seen)
    there = [one for one in seen.replicas if one.state != "draining"]
    ready = [one for one in there if one.state == "ready"]
    have = whole(sum(worth(seen, one.gpu) for one in there))
    serve = math.floor(sum(worth(seen, one.gpu) for one in ready) + _LITTLE)
    if ready:
        serve = max(serve, 1)
    if len(ready) == len(there):
        serve = have
    since_s = min((one.since_s for one in there), default=0.0)
    counted = [ReplicaSeen(f"{unit}-{n}", "ready" if n < serve else "starting", since_s, unit) for n in range(have)]
    return replace(
        seen,
        settings=replace(seen.settings, gpus=(unit,)),
        replicas=[*counted, *(one for one in seen.replicas if one.state == "draining")],
    )


def _learnt(rates: Rates) -> bool:
    return bool(rates.prefill_tokens_per_s and rates.decode_tokens_per_s)
