"""Part new_gateway: of two gateways one is killed under load, and another starts in its place.

Each worker sends the new gateway a snapshot of its blocks. The hit rate counts as back at the first moment after which
the calls of the next WINDOW_S find, at the new gateway, at least ENOUGH of the tokens that they find cached in a run in
which nothing is killed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loadtests.figures import Bound, Figure
from loadtests.routing.calls import RoutedCall
from loadtests.routing.cluster import Cluster, ClusterConfig
from loadtests.routing.outcome import run_all
from loadtests.routing.policies import OURS
from loadtests.routing.traffic import mooncake
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact

BLOCKS, SPEED = 3000, 1.0
KILL_S, WINDOW_S, GRID_S = 900.0, 120.0, 0.25
ENOUGH = 0.98
BACK = "a gateway killed, another started under load: hit rate back after"
ROWS: Mapping[str, Bound] = {BACK: Bound("<=", 2.0)}


def run(is_killed: bool, seed: int) -> list[tuple[float, int, int]]:
    """Return arrival, gateway and cached tokens of each call. The load is that of Mooncake's trace."""
    cluster = Cluster(ClusterConfig(OURS, blocks=BLOCKS, gateways=2, seed=seed))
    for number, (at_s, prompt) in enumerate(mooncake(SPEED)):
        if at_s < KILL_S + 2 * WINDOW_S:
            # calls alternate, so that both runs have the same calls at the same place
            cluster.events.at(at_s, lambda p=prompt, n=number: cluster.send(p, list(cluster.gateways)[n % 2]))  # type: ignore[misc]
    if is_killed:
        cluster.events.at(KILL_S, lambda: replace_gateway(cluster, 0))
    cluster.run(KILL_S + 2 * WINDOW_S).finish()
    return [(call.arrived, call.gateway, call.cached) for call in cluster.calls]


def replace_gateway(cluster: Cluster, number: int) -> list[RoutedCall]:
    """Kill a gateway and start another, to which the callers of waiting calls turn. Returns these calls."""
    waiting = cluster.kill_gateway(number)
    new = cluster.add_gateway()
    for call in waiting:
        call.gateway = new
        cluster.enter(call)
    return waiting


def back_after_s(killed: Sequence[tuple[float, int, int]], usual: Sequence[tuple[float, int, int]]) -> float:
    """Return after how many seconds the hit rate is back; WINDOW_S if it is not within that time."""
    pairs = [
        (at, cached, other) for (at, gateway, cached), (_, _, other) in zip(killed, usual, strict=True) if gateway > 1
    ]
    for step in range(round(WINDOW_S / GRID_S)):
        begin = KILL_S + step * GRID_S
        window = [(cached, other) for at, cached, other in pairs if begin <= at < begin + WINDOW_S]
        if sum(cached for cached, _ in window) >= ENOUGH * sum(other for _, other in window):
            return step * GRID_S
    return WINDOW_S


async def measure(stage: Stage) -> list[Figure]:
    """Return the rows of the part."""
    mooncake(most=1)
    killed, usual = await run_all([(run, (is_killed, stage.options.seed)) for is_killed in (True, False)])
    return [exact(BACK, back_after_s(killed, usual), ROWS[BACK], "s", f"in steps of {GRID_S} s")]
