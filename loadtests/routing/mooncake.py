"""The part `mooncake`: Mooncake's conversation trace on eight workers with small and with large caches, under each
routing policy.

The reference for hits is one LRU cache as large as all workers' caches together, which stores a prompt when it arrives.
The reference for times is the best plain policy of the same run, chosen for mean and p99 separately.
"""

from __future__ import annotations

from collections.abc import Mapping

from loadtests.figures import Bound, Figure
from loadtests.routing.cluster import Cluster, ClusterConfig, replay
from loadtests.routing.outcome import Outcome, curves, measured, run_all
from loadtests.routing.policies import OURS, PLAIN
from loadtests.routing.traffic import mooncake, with_adapters
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact
from loadtests.sim.adapters import AdapterMix

BLOCKS = (600, 3000)
POLICIES = (OURS, "impatient cost", *PLAIN)
HITS = "Mooncake, {blocks} blocks a worker: hit tokens against one pooled LRU"
MEAN = "Mooncake, {blocks} blocks: mean TTFT against the best plain policy"
P99 = "Mooncake, {blocks} blocks: p99 TTFT against the best plain policy"
ROWS: Mapping[str, Bound] = {
    row.format(blocks=blocks): bound
    for blocks in BLOCKS
    for row, bound in ((HITS, Bound(">=", 0.98)), (MEAN, Bound("<=", 1.0)), (P99, Bound("<=", 1.0)))
}


def run(
    policy: str,
    blocks: int,
    seed: int,
    speed: float = 1.0,
    most: int | None = None,
    adapters: AdapterMix | None = None,
) -> Outcome:
    """Replay Mooncake's trace. `policy`: name of the routing policy. `blocks`: number of KV blocks of each worker.
    `speed`: factor of the arrival rate. `most`: largest number of calls, None for all."""
    config = ClusterConfig(policy, blocks=blocks, seed=seed, adapters=adapters)
    return measured(policy, replay(Cluster(config), with_adapters(mooncake(speed, most), adapters)))


async def measure(stage: Stage) -> list[Figure]:
    """Return the report's rows for this part."""
    mooncake(most=1)  # a missing trace is reported before any process starts
    seed, mix = stage.options.seed, stage.options.adapter_mix
    outcomes = await run_all(
        [(run, (policy, blocks, seed, 1.0, None, mix)) for blocks in BLOCKS for policy in POLICIES]
    )
    figures = list[Figure]()
    for number, blocks in enumerate(BLOCKS):
        cell = {o.label: o for o in outcomes[number * len(POLICIES) : (number + 1) * len(POLICIES)]}
        figures += _figures(blocks, cell)
        stage.report.settings.setdefault("routing", {})[f"mooncake {blocks}"] = [o.as_json() for o in cell.values()]
        stage.report.settings.setdefault("ttft_ms", {})[f"mooncake {blocks}"] = curves(list(cell.values()))
    return figures


def _hits(ours: Outcome, round_robin: Outcome) -> str:
    return (
        f"hit rate {ours.hit_rate:.3f}; {ours.hits_alike:.3f} of a pooled cache with the same calls at the same times; "
        f"round robin {round_robin.hits:.3f} of the pooled LRU"
    )


def _figures(blocks: int, cell: Mapping[str, Outcome]) -> list[Figure]:
    ours, plain = cell[OURS], [cell[policy] for policy in PLAIN]
    mean, p99 = min(plain, key=lambda o: o.mean_s), min(plain, key=lambda o: o.p99_s)
    rows = (
        (HITS, ours.hits, _hits(ours, cell["round robin"])),
        (MEAN, ours.mean_s / mean.mean_s, f"{ours.mean_s:.3f} s; {mean.label} {mean.mean_s:.3f} s"),
        (P99, ours.p99_s / p99.p99_s, f"{ours.p99_s:.3f} s; {p99.label} {p99.p99_s:.3f} s"),
    )
    names = [(row.format(blocks=blocks), value, note) for row, value, note in rows]
    return [exact(name, value, ROWS[name], "ratio", note) for name, value, note in names]
