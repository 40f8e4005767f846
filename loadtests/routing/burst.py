"""The part `burst`: 64 calls with the same prefix arrive at eight workers within a millisecond. Before the burst,
either all workers hold the prefix, or only one worker does.

A worker's load is the number of calls that were sent to it within 5 s of the burst.
"""

from __future__ import annotations

from collections.abc import Mapping

from loadtests.figures import Bound, Figure
from loadtests.routing.calls import BLOCK_TOKENS, Prompt
from loadtests.routing.cluster import Cluster, ClusterConfig
from loadtests.routing.outcome import variation
from loadtests.routing.policies import OURS
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact

CALLS, AFTER_S, WARM_S = 64, 5.0, 60.0
SHARED_BLOCKS = 8
OWN_TOKENS, OUTPUT_TOKENS = 200, 256
ALL = "64 equal calls in 1 ms, all of 8 workers hold the prefix: coefficient of variation of calls"
ONE = "64 equal calls in 1 ms, one worker holds the prefix: most calls at a worker after 5 s, against the mean"
ROWS: Mapping[str, Bound] = {ALL: Bound("<=", 0.1), ONE: Bound("<=", 1.5)}
_SHARED = tuple(range(1, SHARED_BLOCKS + 1))


def _prompt() -> Prompt:
    return Prompt("t", SHARED_BLOCKS * BLOCK_TOKENS + OWN_TOKENS, OUTPUT_TOKENS, _SHARED)


def loads(policy: str, holders: int, seed: int) -> list[int]:
    """Return the number of calls that each worker got within AFTER_S of the burst. `holders`: number of workers that
    hold the prefix before the burst."""
    cluster = Cluster(ClusterConfig(policy, seed=seed))
    for worker in cluster.workers[:holders]:
        prompt = _prompt()
        worker.cache.acquire(prompt.names, 0, prompt.total)
        worker.cache.commit(prompt.names)
        worker.cache.release(prompt.names, prompt.total - prompt.whole)
        cluster.report_blocks(worker)
    cluster.run(WARM_S)
    for number in range(CALLS):
        cluster.events.at(WARM_S + number * 1e-3 / CALLS, lambda: cluster.send(_prompt()))
    cluster.run(WARM_S + AFTER_S)
    counts = [worker.submitted for worker in cluster.workers]
    cluster.finish()
    return counts


async def measure(stage: Stage) -> list[Figure]:
    """Return the report's rows for this part."""
    seed = stage.options.seed
    every, single = loads(OURS, 8, seed), loads(OURS, 1, seed)
    mean = sum(single) / len(single)
    return [
        exact(ALL, variation(every), ROWS[ALL], "ratio", f"calls {every}"),
        exact(ONE, max(single) / mean, ROWS[ONE], "ratio", f"calls {single}"),
    ]
