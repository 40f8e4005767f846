"""Part `slow` of the load test: at any time one of eight workers is ten times slower, but still passes its checks.

Three configurations are compared: routing by the workers' measured rates, the same with hedging, and neither of the
two. Every EPISODE_S another worker becomes slow. Routing by measured rates keeps nearly all new calls away from a slow
worker. Hedging helps the calls that a worker already has when it becomes slow. The calls are those of Azure's
conversation trace. Its prompts are so short that the slow worker, not the longest prompt, decides the p99 of the time
to first token.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from cluster.policy.scheduling.hedging import HedgingPolicy
from loadtests.figures import Bound, Figure
from loadtests.routing.cluster import Cluster, ClusterConfig, replay
from loadtests.routing.outcome import Outcome, curves, measured, run_all
from loadtests.routing.policies import OURS
from loadtests.routing.traffic import azure
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact

SLOWNESS, EPISODE_S = 10.0, 10.0
SPEED, CALLS, SHARE = 3.5, 12_000, 0.01
NEITHER, RATES, BOTH = "neither", "rates", "rates and hedging"
AGAINST_NEITHER = "one of 8 workers 10x slower: p99 TTFT with rates and hedging, against neither"
AGAINST_RATES = "one of 8 workers 10x slower: p99 TTFT with rates and hedging, against rates alone"
HEDGED = "one of 8 workers 10x slower: calls hedged"
TWICE = "one of 8 workers 10x slower: calls answered, and so billed, by two workers"
ROWS: Mapping[str, Bound] = {
    AGAINST_NEITHER: Bound("<=", 0.5),
    AGAINST_RATES: Bound("<=", 0.9),
    HEDGED: Bound("<=", 1.0),
    TWICE: Bound("<=", 0),
}


def run(label: str, seed: int, most: int = CALLS) -> tuple[Outcome, int]:
    """Run one of the three configurations with at most `most` calls. `label`: name of the configuration. Returns its
    measurements, and the number of calls that two workers answered."""
    config = ClusterConfig(
        OURS if label != NEITHER else "cost without rates",
        seed=seed,
        hedger_of=partial(HedgingPolicy, SHARE if label == BOTH else 0.0),
    )
    cluster = Cluster(config)
    episodes = 0

    def next_episode() -> None:
        nonlocal episodes
        cluster.workers[episodes % config.workers].set_slowness(1.0)
        episodes += 1
        cluster.workers[episodes % config.workers].set_slowness(SLOWNESS)

    cluster.events.every(EPISODE_S, next_episode)
    replay(cluster, azure(SPEED, most))
    return measured(label, cluster), sum(len(call.answered_by) > 1 for call in cluster.calls)


async def measure(stage: Stage) -> list[Figure]:
    """Return the report's rows for this part."""
    azure(most=1)
    results = await run_all([(run, (label, stage.options.seed)) for label in (NEITHER, RATES, BOTH)])
    neither, rates, both = outcomes = [outcome for outcome, _ in results]
    stage.report.settings.setdefault("routing", {})["slow"] = [o.as_json() for o in outcomes]
    stage.report.settings.setdefault("ttft_ms", {})["slow"] = curves(outcomes)
    note = "p99 " + ", ".join(f"{o.label} {o.p99_s:.3f} s" for o in outcomes)
    return [
        exact(AGAINST_NEITHER, both.p99_s / neither.p99_s, ROWS[AGAINST_NEITHER], "ratio", note),
        exact(AGAINST_RATES, both.p99_s / rates.p99_s, ROWS[AGAINST_RATES]),
        exact(HEDGED, 100 * both.hedged / both.calls, ROWS[HEDGED], "%", f"{both.hedged} calls"),
        exact(TWICE, results[2][1], ROWS[TWICE], "calls"),
    ]
