"""Tests of adapters in simulated clusters: which calls name an adapter, which adapters are in an engine's slots, and to
which worker a call goes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from loadtests.routing.cluster import Cluster, ClusterConfig, replay
from loadtests.routing.traffic import with_adapters
from loadtests.sim.adapters import AdapterMix, AdapterSlots
from loadtests.sim.traffic import Lengths, SimTenant
from loadtests.sim.world import World, WorldConfig
from tests.sim.test_routing import traffic

MIX = AdapterMix(0.5, count=6, slots=2, copy_s=0.2)


def test_a_share_of_the_keys_names_adapters() -> None:
    """The configured share of the call keys is mapped to adapters. The first adapter is chosen most often. A key is
    always mapped to the same adapter."""
    named = [MIX.adapter_of(key) for key in range(4000)]
    assert named == [MIX.adapter_of(key) for key in range(4000)]
    counts = Counter(named)
    assert 0.47 < 1 - counts[""] / 4000 < 0.53
    assert 1.7 < counts["a0"] / counts["a1"] < 2.3
    assert set(named) == {"", *MIX.names}


@given(st.lists(st.sampled_from(["", *MIX.names]), max_size=60))
def test_the_least_recently_used_adapter_leaves_its_slot(calls: list[str]) -> None:
    """With n slots, an engine copies an adapter if and only if it is not among the n adapters that were used last."""
    slots, used = AdapterSlots(MIX), list[str]()
    for adapter in calls:
        newest = list(dict.fromkeys(reversed(used)))[: MIX.slots]
        assert slots.use(adapter) == (MIX.copy_s if adapter and adapter not in newest else 0.0)
        used += [adapter] if adapter else []
        assert slots.resident == set(list(dict.fromkeys(reversed(used)))[: MIX.slots])


def copies(policy: str) -> int:
    """Return how often the engines have copied an adapter into a slot under a routing policy."""
    config = ClusterConfig(policy, workers=3, blocks=600, adapters=MIX)
    calls = [(at_s, replace(prompt, blocks=())) for at_s, prompt in with_adapters(traffic(3, 300), MIX)]
    cluster = replay(Cluster(config), calls)
    assert all(len(call.answered_by) == 1 and call.generated == call.prompt.output_tokens for call in cluster.calls)
    assert {call.prompt.adapter for call in cluster.calls} > {""}
    return sum(worker.copies for worker in cluster.workers)


def test_calls_go_where_their_adapter_lies() -> None:
    """The gateways' routing policy copies adapters into engine slots less often than a policy that ignores which
    adapters are in the slots."""
    assert copies("cost") < 0.8 * copies("least load")


def test_tenants_with_adapters_are_served() -> None:
    """Two simulated tenants use adapters. Every worker copies adapters into slots, and all calls that arrived end."""
    tenants = [SimTenant(name, [Lengths(100, 20)], rate_s=5.0) for name in ("one", "two")]
    world = World(WorldConfig(tenants, workers=2, adapters=MIX)).run(10.0)
    world.stop_arrivals()
    world.run(60.0)
    assert all(not gateway.calls for gateway in world.gateways)
    assert all(worker.slots is not None and worker.slots.copies > 0 for worker in world.workers)
