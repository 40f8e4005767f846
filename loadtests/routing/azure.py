"""The part `azure`: the gateways' policy compared with the policy "least load" on Azure's conversation trace, in which
no prompt shares a block with another."""

from __future__ import annotations

from collections.abc import Mapping

from loadtests.figures import Bound, Figure
from loadtests.routing.cluster import Cluster, ClusterConfig, replay
from loadtests.routing.outcome import Outcome, curves, measured, run_all
from loadtests.routing.policies import OURS
from loadtests.routing.traffic import azure, with_adapters
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact
from loadtests.sim.adapters import AdapterMix

SPEED = 4.0
"""Factor of the arrival rate. At 8, the decode slots of eight workers are all in use, and the queue grows."""
LEAST_LOAD = "least load"
MEAN = "Azure conversations, no reuse: mean TTFT against least load"
ROWS: Mapping[str, Bound] = {MEAN: Bound("<=", 1.02)}


def run(
    policy: str, seed: int, speed: float = SPEED, most: int | None = None, adapters: AdapterMix | None = None
) -> Outcome:
    """Replay the trace. `speed`: factor of the arrival rate. `most`: largest number of calls, None for all."""
    cluster = Cluster(ClusterConfig(policy, seed=seed, adapters=adapters))
    return measured(policy, replay(cluster, with_adapters(azure(speed, most), adapters)))


async def measure(stage: Stage) -> list[Figure]:
    """Return the report's rows for this part."""
    azure(most=1)
    seed, mix = stage.options.seed, stage.options.adapter_mix
    ours, theirs = await run_all([(run, (policy, seed, SPEED, None, mix)) for policy in (OURS, LEAST_LOAD)])
    stage.report.settings.setdefault("routing", {})["azure"] = [ours.as_json(), theirs.as_json()]
    stage.report.settings.setdefault("ttft_ms", {})["azure"] = curves([ours, theirs])
    note = f"{ours.mean_s:.4f} s; least load {theirs.mean_s:.4f} s"
    return [exact(MEAN, ours.mean_s / theirs.mean_s, ROWS[MEAN], "ratio", note)]
