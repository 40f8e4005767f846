"""`python -m loadtests.autoscale_live.choice`: what it would save to choose the replica that leaves, by a small model.

Calls come at random, each to the replica with the fewest streams, and their lengths are exponential. Asked at random
moments: how many streams has a replica that is chosen blindly, how many the one with the fewest, and how many of these
outlast the time to stay (half of that to drain), so that they have to move. Prefix affinity is left out: it makes
replicas less alike.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass

REPLICAS = 4
PLACES = 16
SPANS = 2000


@dataclass(frozen=True, slots=True)
class Choice:
    """Means over many moments. `moved`: of the streams, those that outlast the time to stay."""

    blind: float
    fewest: float
    blind_moved: float
    fewest_moved: float


def choice(use: float, mean_s: float, stay_s: float, chance: random.Random) -> Choice:
    """Where `use` of PLACES streams a replica is taken, and streams take `mean_s` in the mean."""
    now_s, looks = 0.0, []
    ends: list[list[float]] = [[] for _ in range(REPLICAS)]
    while now_s < SPANS * mean_s:
        now_s += chance.expovariate(use * REPLICAS * PLACES / mean_s)
        ends = [[at for at in them if at > now_s] for them in ends]
        blind, fewest = chance.choice(ends), min(ends, key=len)
        moved = [sum(at > now_s + stay_s for at in them) for them in (blind, fewest)]
        looks.append((len(blind), len(fewest), *moved))
        min(ends, key=lambda them: (len(them), chance.random())).append(now_s + chance.expovariate(1 / mean_s))
    return Choice(*(statistics.fmean(column) for column in zip(*looks, strict=True)))


if __name__ == "__main__":
    for used in (0.1, 0.3, 0.6):
        for mean, stay in ((20.0, 1.0), (20.0, 150.0), (120.0, 150.0)):
            print(f"{used:.0%} taken, streams of {mean:g} s, {stay:g} s:", choice(used, mean, stay, random.Random(1)))
