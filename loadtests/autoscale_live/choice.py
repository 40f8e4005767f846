"""`python -m loadtests.autoscale_live.choice`: estimate how many fewer streams must move if the replica with the fewest
streams is removed instead of a random replica.

Calls arrive at random, each goes to the replica with the fewest streams, and lengths are exponential. At random moments
the program counts the streams of a random replica and of the replica with the fewest streams. It also counts how many
of these streams would have to move, because they last longer than half of the drain time. Prefix affinity is left out;
it would make replicas less alike.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass

REPLICAS = 4
PLACES = 16
SPANS = 2000


@dataclass(frozen=True, slots=True)
class PolicySweep:
    """Mean numbers of streams over many moments. `blind`: streams on a random replica. `fewest`: streams on the replica
    with the fewest streams. `blind_moved`, `fewest_moved`: how many of these streams would have to move if the replica
    were removed."""

    blind: float
    fewest: float
    blind_moved: float
    fewest_moved: float


def sweep_policies(use: float, mean_s: float, stay_s: float, chance: random.Random) -> PolicySweep:
    """Simulate the streams on a set of replicas, and compare two ways to choose the replica to remove: at random,
    or the one with the fewest streams.

    `use`: mean number of streams on a replica, divided by PLACES, the number of streams that it can take.
    `mean_s`: mean length of a stream. `stay_s`: time for which a stream may stay on a removed replica.
    """
    now_s, looks = 0.0, []
    ends: list[list[float]] = [[] for _ in range(REPLICAS)]
    while now_s < SPANS * mean_s:
        now_s += chance.expovariate(use * REPLICAS * PLACES / mean_s)
        ends = [[at for at in streams if at > now_s] for streams in ends]
        blind, fewest = chance.choice(ends), min(ends, key=len)
        moved = [sum(at > now_s + stay_s for at in streams) for streams in (blind, fewest)]
        looks.append((len(blind), len(fewest), *moved))
        min(ends, key=lambda streams: (len(streams), chance.random())).append(now_s + chance.expovariate(1 / mean_s))
    return PolicySweep(*(statistics.fmean(column) for column in zip(*looks, strict=True)))


if __name__ == "__main__":
    for used in (0.1, 0.3, 0.6):
        for mean, stay in ((20.0, 1.0), (20.0, 150.0), (120.0, 150.0)):
            print(
                f"{used:.0%} taken, streams of {mean:g} s, {stay:g} s:",
                sweep_policies(used, mean, stay, random.Random(1)),
            )
