"""The part `new_gateway`: one of two gateways is killed under load, and another starts in its place.

Each worker sends the new gateway a snapshot of its KV blocks. For each call, two numbers of prompt tokens are
compared: the most tokens that any worker holds in its cache, and how many of them the new gateway's index finds.
The second number divided by the first is the share of cached tokens that the new gateway knows. It is computed over
all calls in a window of WINDOW_S seconds. The hit rate counts as restored at the beginning of the first window in
which the share is at least ENOUGH.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import NamedTuple

from loadtests.figures import Bound, Figure
from loadtests.routing.calls import BLOCK_TOKENS, RoutedCall
from loadtests.routing.cluster import Cluster, ClusterConfig
from loadtests.routing.outcome import run_all
from loadtests.routing.policies import OURS
from loadtests.routing.traffic import mooncake
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact

BLOCKS, SPEED = 3000, 1.0
KILL_S, FOR_S, WINDOW_S, GRID_S = 600.0, 60.0, 5.0, 0.05
ENOUGH = 0.98
STAMP_S = 3.0
"""Resolution of the trace's times. Calls with equal times are spread over this time, so that calls arrive throughout
it."""
BACK = "a gateway killed, another started under load: hit rate back after"
ROWS: Mapping[str, Bound] = {BACK: Bound("<=", 2.0)}


class Known(NamedTuple):
    """Knowledge of a new gateway about one call's prompt. `after_s`: arrival of the call, in seconds after the gateway
    started. `held`: largest number of leading prompt tokens that any worker holds. `known`: how many of these tokens
    the gateway's index finds on one worker."""

    after_s: float
    held: int
    known: int


def run(seed: int, kill_s: float = KILL_S, for_s: float = FOR_S) -> list[Known]:
    """Replay Mooncake's trace with two gateways, and replace one of them by a new gateway at `kill_s`. Return the calls
    that the new gateway gets in the `for_s` seconds after that."""
    cluster = Cluster(ClusterConfig(OURS, blocks=BLOCKS, gateways=2, seed=seed))
    rng = Random(seed)
    for at_s, prompt in mooncake(SPEED):
        if at_s < kill_s + for_s:
            spread_s = rng.uniform(0, STAMP_S)
            cluster.events.at(at_s + spread_s, lambda prompt=prompt: cluster.send(prompt))  # type: ignore[misc]
    cluster.run(kill_s)
    replace_gateway(cluster, 0)
    calls = list[Known]()

    def observe(what: str, call: RoutedCall) -> None:
        if what == "arrived" and call.gateway > 1:
            prompt = call.prompt
            held = max(worker.cache.match(prompt.names[: prompt.reusable]) for worker in cluster.workers)
            known = max(cluster.gateways[call.gateway].index.match(prompt.hashes).values(), default=0)
            after_s = cluster.events.now - kill_s
            calls.append(Known(after_s, held * BLOCK_TOKENS, min(known, held) * BLOCK_TOKENS))

    cluster.on_event = observe
    cluster.run(kill_s + for_s)
    return calls


def replace_gateway(cluster: Cluster, number: int) -> list[RoutedCall]:
    """Kill a gateway, start a new one, and send the calls that waited at the killed gateway to the new one. Return
    these calls."""
    waiting = cluster.kill_gateway(number)
    new = cluster.add_gateway()
    for call in waiting:
        call.gateway = new
        cluster.enter(call)
    return waiting


def back_after_s(calls: Sequence[Known]) -> float:
    """Return the seconds from the start of the new gateway until it knows at least the share ENOUGH of the cached
    tokens. Returns FOR_S if that takes longer."""
    for step in range(round(FOR_S / GRID_S)):
        window = [call for call in calls if step * GRID_S <= call.after_s < step * GRID_S + WINDOW_S]
        if sum(call.known for call in window) >= ENOUGH * sum(call.held for call in window):
            return step * GRID_S
    return FOR_S


async def measure(stage: Stage) -> list[Figure]:
    """Return the report's rows for this part."""
    mooncake(most=1)
    (calls,) = await run_all([(run, (stage.options.seed,))])
    back_s = back_after_s(calls)
    later = [call for call in calls if call.after_s >= back_s]
    share = sum(call.known for call in later) / max(sum(call.held for call in later), 1)
    note = f"then it knows {100 * share:.2f} % of the cached tokens of {len(later)} prompts"
    return [exact(BACK, back_s, ROWS[BACK], "s", note)]
