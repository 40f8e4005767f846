"""Calls of a live run, drawn before the run begins. The functions are pure: equal seeds give equal calls."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

PROMPTS = 12


@dataclass(frozen=True, slots=True)
class Engine:
    """Speed of a simulated replica: steps of `decode_s` at any load, and at most `max_num_seqs` sequences at once."""

    decode_s: float = 0.05
    max_num_seqs: int = 8
    prefill_tokens_per_s: float = 4000.0
    load_s: float = 2.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of a fully loaded replica."""
        return self.max_num_seqs / self.decode_s


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """A planned call. `at_s`: seconds from the run's beginning; `face`: 0 is the SDK, 1 the stock openai client."""

    at_s: float
    tokens: int
    face: int
    prompt: int


def days(seed: int, count: int, seconds: float, engine: Engine, replicas: int, **more: Any) -> Sequence[PlannedCall]:
    """Return the planned calls of `count` days. Each day has different calls. `seconds`: length of a day. The other
    arguments are passed to `plan`."""
    return [
        replace(call, at_s=call.at_s + day * seconds)
        for day in range(count)
        for call in plan(seed + day, seconds, engine, replicas, **more)
    ]


def share_of_most(part: float, at_zero: float = 0.08) -> float:
    """Return the demand at the fraction `part` of a run, as a fraction of the peak. The demand rises to a plateau at
    the peak, falls to a low level, and rises again more steeply. `at_zero`: the low level."""
    points = ((0.0, 0.2), (0.1, 0.2), (0.4, 1.0), (0.55, 1.0), (0.7, at_zero), (0.8, at_zero), (0.85, 0.8), (1.0, 0.8))
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if part <= x1:
            return y0 + (y1 - y0) * (part - x0) / (x1 - x0)
    return points[-1][1]


def plan(
    seed: int, seconds: float, engine: Engine, replicas: int, load: float = 0.7, stream_s: tuple[float, float] = (5, 60)
) -> Sequence[PlannedCall]:
    """Return calls with Poisson arrivals (by thinning) and log-uniform stream lengths. At the peak the demand is the
    fraction `load` of the capacity of all replicas.
    """
    chance = random.Random(seed)
    low, high = stream_s
    mean_s = (high - low) / math.log(high / low)
    most_per_s = load * replicas * engine.max_num_seqs / mean_s
    at = 0.0
    calls: list[PlannedCall] = []
    while True:
        at += chance.expovariate(most_per_s)
        if at >= seconds:
            return calls
        if chance.random() > share_of_most(at / seconds):
            continue
        length_s = low * (high / low) ** chance.random()
        tokens = max(int(length_s / engine.decode_s), 2)
        calls.append(PlannedCall(at, tokens, len(calls) % 2, chance.randrange(PROMPTS)))
