"""Tests of the states of a model's replicas and of the learnt cold-start time."""

from __future__ import annotations

from collections import Counter

import pytest

from cluster.api.types import ModelSpec
from cluster.policy.scaling.inputs import ModelInputs, RayReplicas, WorkerSeen
from cluster.policy.scaling.replica_states import NEWEST, ReplicaStates

SPEC = ModelSpec("m", "/m")
WALL_S = 1e9


def states_at(states: ReplicaStates, now: float, desired: int, *workers: WorkerSeen, leaving: int = 0) -> Counter[str]:
    """Observe `workers` once in `states`, at the time `now`, and return the number of replicas by state."""
    inputs = ModelInputs((SPEC,), {"": RayReplicas(leaving=leaving)}, {"": workers}, {})
    return Counter(replica.state for replica in states.observe(inputs, {"": desired}, now, now + WALL_S))


def test_states_follow_the_decided_number() -> None:
    """Connected replicas are ready, and missing replicas are starting. If more are connected than the decided number,
    the newest ones are draining."""
    states, old, young = ReplicaStates(), WorkerSeen("old", "1", "m"), WorkerSeen("young", "2", "m")
    assert states_at(states, 0.0, 2, old) == {"ready": 1, "starting": 1}
    assert states_at(states, 1.0, 2, young, old) == {"ready": 2}
    inputs = ModelInputs((SPEC,), {}, {"": (young, old)}, {})
    assert {one.replica_id: one.state for one in states.observe(inputs, {"": 1}, 2.0, WALL_S)} == {
        "old": "ready",
        "young": "draining",
    }
    assert states_at(states, 3.0, 1, old, leaving=2) == {"ready": 1, "draining": 2}


def test_the_cold_start_time_is_learnt_from_decided_starts() -> None:
    """A new replica is matched with the oldest decision to start a replica that has no match yet. The cold-start time
    is counted from this decision. A new replica without a match is not counted."""
    states, workers = ReplicaStates(), [WorkerSeen(str(number), str(number), "m") for number in range(4)]
    states_at(states, 0.0, 1, workers[0])
    assert states.cold_start_s == 0.0
    states.record_change([2], 10.0)
    states_at(states, 10.0, 3, workers[0])
    states_at(states, 30.0, 3, *workers[:2])
    assert states.cold_start_s == pytest.approx(20.0)
    states_at(states, 50.0, 3, *workers[:3])
    assert states.cold_start_s == pytest.approx(20.0 + NEWEST * 20.0)
    states.record_change([1], 60.0)
    states.record_change([-1], 61.0)
    states_at(states, 62.0, 4, *workers)
    assert states.cold_start_s == pytest.approx(26.0), "the decision was withdrawn"


def test_a_start_without_a_serving_replica_has_a_time() -> None:
    """While replicas start and none serves, `starting_since_s` is the time of the oldest decision whose replica is
    missing."""
    states = ReplicaStates()
    states.record_change([1], 5.0)
    states_at(states, 7.0, 1)
    states_at(states, 9.0, 1)
    assert states.starting_since_s == 5.0 + WALL_S
    states_at(states, 11.0, 1, WorkerSeen("a", "a", "m"))
    assert states.starting_since_s == 0.0
