"""The policies of the section `routing`, through a real gateway with three simulated engines."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from cluster.policy.routing.cost import PolicyName
from cluster.wire.bundle import Bundle
from tests.support.calls import complete
from tests.support.cluster import LOOPBACK, running_cluster, sim_engine


@pytest.mark.parametrize("policy", get_args(PolicyName))
async def test_each_policy_serves(policy: PolicyName, tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """Each policy sends calls to workers. With round robin, idle workers get calls in turn. With consistent hashing,
    equal prompts go to one worker."""
    async with running_cluster(tmp_path, LOOPBACK + f"routing: {{policy: {policy}}}\n") as cluster:
        engines = [sim_engine(checkpoint, decode_ms=0.2) for _ in range(3)]
        for engine in engines:
            await cluster.add_worker(engine, bundle)
        for _ in range(6):
            await cluster.stub.Complete(complete("A prompt", max_tokens=2))
        counts = sorted(engine.statistics().submitted for engine in engines)
    assert sum(counts) == 6
    if policy == "round_robin":
        assert counts == [2, 2, 2]
    if policy == "consistent_hash":
        assert counts == [0, 0, 6]
