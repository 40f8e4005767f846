"""Part `gateways` of the load test: runs with one to eight gateways. Each gateway has its own index of cached blocks,
and its share of the workers' credit (granted capacity)."""

from __future__ import annotations

from collections.abc import Mapping

from loadtests.figures import Bound, Figure
from loadtests.routing.cluster import Cluster, ClusterConfig, replay
from loadtests.routing.outcome import Outcome, curves, measured, run_all
from loadtests.routing.policies import OURS
from loadtests.routing.traffic import mooncake
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact

GATEWAYS = (1, 2, 4, 8)
BLOCKS, CALLS = 3000, 6000
LOSS = "hit rate with 1 gateway less that with 2 to 8, at worst"
LOAD = "coefficient of variation of the workers' computed tokens with 1 to 8 gateways, at worst"
ROWS: Mapping[str, Bound] = {LOSS: Bound("<=", 1.0), LOAD: Bound("<=", 0.06)}


def run(gateways: int, seed: int, most: int = CALLS) -> Outcome:
    """Replay the first `most` calls of Mooncake's trace on a cluster with `gateways` gateways."""
    config = ClusterConfig(OURS, blocks=BLOCKS, gateways=gateways, seed=seed)
    return measured(f"{gateways} gateways", replay(Cluster(config), mooncake(most=most)))


async def measure(stage: Stage) -> list[Figure]:
    """Return the report's rows for this part."""
    mooncake(most=1)
    outcomes = await run_all([(run, (gateways, stage.options.seed)) for gateways in GATEWAYS])
    stage.report.settings.setdefault("routing", {})["gateways"] = [o.as_json() for o in outcomes]
    stage.report.settings.setdefault("ttft_ms", {})["gateways"] = curves(outcomes)
    loss = max(outcomes[0].hit_rate - o.hit_rate for o in outcomes[1:])
    rates = ", ".join(f"{o.label} {100 * o.hit_rate:.2f} %" for o in outcomes)
    spreads = ", ".join(f"{o.label} {o.variation:.3f}" for o in outcomes)
    return [
        exact(LOSS, 100 * loss, ROWS[LOSS], "points", rates),
        exact(LOAD, max(o.variation for o in outcomes), ROWS[LOAD], "ratio", spreads),
    ]
