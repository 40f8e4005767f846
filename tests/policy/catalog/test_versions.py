"""Tests of versions of a model that run beside each other: their shares of the calls, their replicas and their GPU
types.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.catalog.versions import ReplicaShare, VersionOverride, over_types, replicas_of, shares, total_for

STAYS, TRIAL = ("v1", "d1"), ("v2", "d2", 0.05)


@pytest.mark.parametrize(
    ("trial", "marks", "expected"),
    [
        (None, {}, (ReplicaShare("v1", 1.0),)),
        (TRIAL, {}, (ReplicaShare("v1", 0.95), ReplicaShare("v2", 0.05))),
        (TRIAL, {"v2": VersionOverride("d2", weight=0.5)}, (ReplicaShare("v1", 0.5), ReplicaShare("v2", 0.5))),
        (TRIAL, {"v2": VersionOverride("d2", gone="slow")}, (ReplicaShare("v1", 1.0), ReplicaShare("v2", 0.0, "slow"))),
        (TRIAL, {"v2": VersionOverride("other", gone="slow")}, (ReplicaShare("v1", 0.95), ReplicaShare("v2", 0.05))),
        (
            TRIAL,
            {"v2": VersionOverride("d2", quarantined=True)},
            (ReplicaShare("v1", 0.95), ReplicaShare("v2", 0.05, quarantined=True)),
        ),
        (
            TRIAL,
            {"v1": VersionOverride("d1", quarantined=True)},
            (ReplicaShare("v1", 0.95, quarantined=True), ReplicaShare("v2", 0.05)),
        ),
        (
            None,
            {"v1": VersionOverride("d1", quarantined=True), "v2": VersionOverride("d2")},
            (ReplicaShare("v1", 1.0, quarantined=True),),
        ),
    ],
)
def test_shares(
    trial: tuple[str, str, float] | None, marks: dict[str, VersionOverride], expected: tuple[ReplicaShare, ...]
) -> None:
    """A version has the weight from the configuration file. A mark (a stored override) changes the version's weight or
    state, but only if the mark has exactly the version's digest."""
    assert shares(STAYS, trial, marks) == expected


def test_marks_survive_json() -> None:
    """A mark (a stored override of a version's weight) is unchanged after a round trip through JSON. An invalid weight
    is refused."""
    mark = VersionOverride("d", 0.25, "slow", True)
    assert VersionOverride.from_json(json.loads(json.dumps(mark.as_json()))) == mark
    with pytest.raises(ValueError, match="weight"):
        VersionOverride.from_json({"digest": "d", "weight": "half"})


@given(st.integers(0, 200), st.floats(0, 1))
def test_every_version_has_room_for_its_part(total: int, weight: float) -> None:
    """Each version has enough replicas for its share of the calls, and at least one. All versions together have at most
    two replicas more than the total."""
    parts = (ReplicaShare("v1", 1 - weight), ReplicaShare("v2", weight))
    counts = replicas_of(total, parts)
    if not total:
        assert counts == {"v1": 0, "v2": 0}
        return
    for part in parts:
        assert counts[part.version] >= max(1, part.weight * total - 1e-3)
    assert total <= sum(counts.values()) <= total + 2
    assert sum(replicas_of(total_for(sum(counts.values()), parts), parts).values()) == sum(counts.values())
    assert total_for(sum(counts.values()), parts) <= total
    assert replicas_of(total, (parts[0], ReplicaShare("v2", 0.0, "bad"))) == {"v1": total, "v2": 0}


@given(st.integers(0, 50), st.lists(st.integers(-3, 20), min_size=1, max_size=4))
def test_types_are_filled_in_their_order(replicas: int, capacities: list[int]) -> None:
    """Every replica gets a GPU type. A type is used only up to its capacity, and only if all earlier types are full.
    Replicas that fit on no type are assigned to the first type, where they wait."""
    counts = over_types(replicas, capacities)
    room = [max(capacity, 0) for capacity in capacities]
    assert sum(counts) == replicas
    assert all(count <= capacity for count, capacity in zip(counts[1:], room[1:], strict=True))
    for i, count in enumerate(counts[1:], start=1):
        if count:
            assert all(counts[j] >= room[j] for j in range(i))
    if replicas <= sum(room):
        assert counts[0] <= room[0]


@given(st.integers(0, 50), st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=4))
def test_what_is_on_a_type_stays_there(replicas: int, types: list[tuple[int, int]]) -> None:
    """Replicas stay on their GPU type, even if a more preferred type has free capacity. Scaling down removes replicas
    of the least preferred type first."""
    room, there = [most for most, _ in types], [min(have, most) for most, have in types]
    counts = over_types(replicas, room, there)
    assert sum(counts) == replicas
    if replicas >= sum(there):
        assert all(count >= have for count, have in zip(counts, there, strict=True))
    else:
        assert all(count <= have for count, have in zip(counts, there, strict=True))
        first_short = next(i for i, (count, have) in enumerate(zip(counts, there, strict=True)) if count < have)
        assert not any(counts[first_short + 1 :])
    assert over_types(replicas, room, counts) == counts
