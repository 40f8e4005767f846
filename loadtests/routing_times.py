"""CPU time of a routing decision over fleets of 1 to 1,000 workers: `python -m loadtests.routing_times`.

The CPU time of the thread is measured, since wall-clock time on a shared machine includes pauses for other work. Before
each decision, `changed` workers change, as happens between two calls. `cached`: number of workers that hold a part of
the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np

from cluster.policy.routing.fleet import Fleet
from cluster.policy.routing.router import Candidate, RouteCall
from cluster.policy.routing.version_split import Build

ROUNDS, SEED = 2000, 7
QUANTILES = (50, 99)


@dataclass(frozen=True, slots=True)
class Case:
    """One measured case, which is one row of the printed table.

    `workers`: number of workers in the fleet. `changed`: number of workers that change before each decision. `cached`:
    number of workers that hold a part of the prompt. `has_key`: whether the calls have an affinity key.
    """

    workers: int
    changed: int
    cached: int
    has_key: bool = False


CASES = [
    *(Case(workers, 1, min(workers, 3)) for workers in (1, 8, 100, 1000)),
    Case(8, 8, 3),
    Case(1000, 20, 8),
    Case(1000, 1, 8, has_key=True),
    Case(1000, 1, 1000),
]


def _worker(number: int, chance: Random) -> Candidate:
    return Candidate(
        f"w{number:04}", "m", Build("v1"), 40 + chance.randrange(24), 10**6, chance.randrange(20), 0, chance.random(),
        True, False, incarnation=f"i{number}", prefill_tokens=chance.randrange(5000), last_sent=chance.random(),
    )  # fmt: skip


def measure(case: Case, rounds: int = ROUNDS) -> tuple[Sequence[float], Sequence[float]]:
    """Return the quantiles of two CPU times in seconds: the time of a routing decision alone, and the time of a
    decision together with the changes of workers that precede it."""
    chance, fleet = Random(SEED), Fleet()
    workers = [_worker(number, chance) for number in range(case.workers)]
    for worker in workers:
        fleet.put(worker)
    decisions, wholes = [], []
    for _ in range(rounds):
        holders = chance.sample(workers, case.cached)
        cached = {worker.worker_id: chance.randrange(16, 10_000) for worker in holders}
        call = RouteCall("m", 10_000, cached=cached, affinity=chance.randrange(1, 1 << 64) if case.has_key else 0)
        changed = [replace(worker, running=chance.randrange(20)) for worker in chance.sample(workers, case.changed)]
        begun = time.thread_time()
        for worker in changed:
            fleet.put(worker)
        read = time.thread_time()
        fleet.pick(call)
        ended = time.thread_time()
        decisions.append(ended - read)
        wholes.append(ended - begun)
    return [*np.percentile(decisions, QUANTILES)], [*np.percentile(wholes, QUANTILES)]


def main() -> None:
    """Measure the routing decisions, and print the table of CPU times."""
    print("| workers | changed | cached on | key | decision p50, p99 | with the changes p50, p99 |")
    print("|---|---|---|---|---|---|")
    for case in CASES:
        decision, whole = (", ".join(f"{1e6 * value:.0f} us" for value in quantiles) for quantiles in measure(case))
        key = "yes" if case.has_key else "no"
        print(f"| {case.workers} | {case.changed} | {case.cached} | {key} | {decision} | {whole} |")


if __name__ == "__main__":
    main()
