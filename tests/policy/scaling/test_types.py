"""Tests of the scaling policy with several GPU types: the worth of a replica (its rate relative to another type), the
distribution of replicas over types, and models with one type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.scaling.portfolio import (
    ClassDemand,
    Memory,
    ModelSeen,
    ModelSettings,
    Observation,
    Rates,
    ReplicaDecision,
    ReplicaSeen,
    decide,
)
from cluster.policy.scaling.portfolio.gpu_equivalence import (
    as_one_type,
    covers,
    replica_worth,
    round_up,
    total_worth,
    unit_of,
)

FAST, SLOW = Rates(4000.0, 1000.0, 100_000), Rates(1000.0, 400.0, 50_000, gpus=2)
RATES = {"H100": FAST, "L4": SLOW}
TYPES = ("H100", "L4")
COUNTS = st.fixed_dictionaries({gpu: st.integers(0, 6) for gpu in TYPES})


def replicas_of(**counts: int) -> Sequence[ReplicaSeen]:
    """Return ready replicas. `counts`: number of replicas by GPU type."""
    return [ReplicaSeen(f"{gpu}-{n}", "ready", 0.0, gpu) for gpu, count in counts.items() for n in range(count)]


def model(
    counts: dict[str, int], rates: dict[str, Rates] | None = None, room: dict[str, int] | None = None, **more: object
) -> ModelSeen:
    """Return the observation of a model for which one request has arrived."""
    given_: dict[str, object] = {"min_replicas": 0, "max_replicas": 40, "gpus": TYPES, **more}
    return ModelSeen(
        ModelSettings(**given_),  # type: ignore[arg-type]
        {"standard": ClassDemand(arrived_requests=1)},
        replicas_of(**counts),
        RATES if rates is None else rates,
        room or {},
    )


def decided(seen: ModelSeen, **budget: int) -> ReplicaDecision:
    """Return the decision of the first round."""
    return decide(Observation({"m": seen}, budget), Memory(), 0.0)[0][0]


def test_a_replica_is_worth_the_lesser_of_what_it_does() -> None:
    """The worth of a replica is relative to a replica on the first GPU type with learnt rates. A replica on a type
    without learnt rates has the worth 1."""
    seen = model({})
    assert (unit_of(seen), replica_worth(seen, "H100"), replica_worth(seen, "L4")) == ("H100", 1.0, 0.25)
    only_slow = model({}, {"L4": SLOW})
    assert (unit_of(only_slow), replica_worth(only_slow, "L4"), replica_worth(only_slow, "H100")) == ("L4", 1.0, 1.0)
    assert (unit_of(model({}, {})), replica_worth(model({}, {}), "L4")) == ("H100", 1.0)
    assert replica_worth(model({}, gpus=("L4",)), "L4") == 1.0


@given(COUNTS, COUNTS)
def test_a_mix_is_counted_by_what_it_is_worth(ready: dict[str, int], starting: dict[str, int]) -> None:
    """A model's replicas on several GPU types are converted to replicas of one type with the same total capacity,
    rounded up.

    The number of converted replicas that count as ready is at most the capacity of the ready replicas, rounded up. A
    model with one GPU type is unchanged.
    """
    seen = model(ready)
    coming = [
        dataclasses.replace(one, state="starting", replica_id="s" + one.replica_id) for one in replicas_of(**starting)
    ]
    seen = dataclasses.replace(seen, replicas=[*seen.replicas, *coming])
    alike = as_one_type(seen)
    there = total_worth(seen, ready) + total_worth(seen, starting)
    assert len(alike.replicas) == round_up(there)
    serve = sum(one.state == "ready" for one in alike.replicas)
    assert serve <= round_up(total_worth(seen, ready))
    assert bool(serve) == any(ready.values())
    alone = dataclasses.replace(seen, settings=dataclasses.replace(seen.settings, gpus=("H100",)))
    assert as_one_type(alone) is alone


@given(COUNTS, COUNTS, COUNTS, st.integers(0, 12), st.booleans())
def test_no_type_has_more_than_its_budget_or_its_places(
    have: dict[str, int], room: dict[str, int], budget: dict[str, int], wanted: int, by_hand: bool
) -> None:
    """Each GPU type stays within its GPU budget, and each type except the first stays within its capacity.

    The model gets the wanted number of replicas as long as a type has both budget and capacity left.
    """
    seen = model(have, room=room, manual=wanted) if by_hand else model(have, room=room, min_replicas=wanted)
    decision = decided(seen, **budget)
    got = {gpu: decision.replicas.get(gpu, 0) for gpu in TYPES}
    assert all(got[gpu] * RATES[gpu].gpus <= budget[gpu] for gpu in TYPES)
    assert got["L4"] <= room["L4"]
    spare = [
        gpu
        for gpu in TYPES
        if (got[gpu] + 1) * RATES[gpu].gpus <= budget[gpu] and (gpu == "H100" or got[gpu] < room[gpu])
    ]
    if spare:
        assert decision.total == wanted if by_hand else decision.total >= wanted
    if got["H100"] > room["H100"]:
        assert got["L4"] == min(room["L4"], budget["L4"] // 2), "it waits for the first type only when none has places"


@given(COUNTS, st.integers(1, 10))
def test_what_serves_is_not_moved(have: dict[str, int], budget: int) -> None:
    """A wanted replica stays on its GPU type, even if a more preferred type has free capacity."""
    total = sum(have.values())
    kept = decided(model(have, room={"H100": 6, "L4": 6}, manual=total))
    assert {gpu: kept.replicas.get(gpu, 0) for gpu in TYPES} == have
    more = decided(model(have, room={"H100": 6 + budget, "L4": 6}, manual=total + 1))
    assert all(more.replicas.get(gpu, 0) >= count for gpu, count in have.items())


def test_lesser_replicas_come_in_greater_numbers() -> None:
    """If replicas do not fit on the first GPU type, a larger number of replicas on the weaker type replaces them, up to
    the maximum number of replicas."""
    settled = dataclasses.replace(model({"H100": 1}, room={"H100": 1, "L4": 9}), demand={})
    busy = ClassDemand(arrived_requests=100, arrived_prompt_tokens=200_000, expected_output_tokens=60_000)
    memory, at = Memory(), 0.0
    decision = ReplicaDecision("m", {}, "")
    for _ in range(100):
        at += 60.0
        seen = dataclasses.replace(settled, demand={"standard": busy}, replicas=replicas_of(**decision.replicas))
        (decision,), memory = decide(Observation({"m": seen}), memory, at)
    load = decision.numbers["load"]
    assert load == pytest.approx(200_000 / 4000 / 60 + 60_000 / 1000 / 60, rel=0.05)
    assert decision.replicas["H100"] == 1
    assert covers(total_worth(settled, decision.replicas), round_up(load))
    assert decision.replicas["L4"] >= 4 * (load - 1) - 1e-6
    assert decision.numbers["given[L4]"] == decision.replicas["L4"]
    few = dataclasses.replace(seen, settings=dataclasses.replace(seen.settings, max_replicas=3))
    (decision,), _ = decide(Observation({"m": few}), memory, at + 5.0)
    assert decision.total == 3


def test_more_than_there_are_gpus_for_is_said() -> None:
    """If there are too few GPUs for the wanted replicas, the reason of the decision says so. For a model with several
    GPU types, the reason counts replicas of one type: the first type with learnt rates."""
    decision = decided(model({}, room={"H100": 1, "L4": 2}, min_replicas=0, manual=5), H100=1, L4=8)
    assert decision.replicas == {"H100": 1, "L4": 2}
    assert decision.why == "manual; the GPU budget allows 3 of 5"
