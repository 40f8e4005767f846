"""Versions of one model side by side: which of them run, with what share of the calls and how many replicas. Pure.

A mark overrides what the file says of a version: an operator rolls a canary back or changes its share of the calls, and
a canary that performs badly is rolled back automatically. A mark applies only to the digest that it was made for (that
of all that the version's replicas are started with), so a corrected version is tried again without removing the mark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class VersionOverride:
    """Override of the file for one version. `digest` identifies the replicas that it applies to.

    `weight` None: use the file's weight. `gone`: why the version must not run at all. `quarantined`: it runs without
    calls.
    """

    digest: str
    weight: float | None = None
    gone: str = ""
    quarantined: bool = False

    def as_json(self) -> dict[str, object]:
        """Plain JSON values; `from_json` is the inverse."""
        return {"digest": self.digest, "weight": self.weight, "gone": self.gone, "quarantined": self.quarantined}

    @staticmethod
    def from_json(values: Mapping[str, object]) -> VersionOverride:
        """Inverse of `as_json`. Raises ValueError for an invalid weight."""
        weight = values.get("weight")
        if not isinstance(weight, (int, float, type(None))):
            raise ValueError(f"weight: {weight!r}")
        return VersionOverride(
            digest=str(values.get("digest", "")),
            weight=None if weight is None else float(weight),
            gone=str(values.get("gone", "")),
            quarantined=bool(values.get("quarantined", False)),
        )


@dataclass(frozen=True, slots=True)
class ReplicaShare:
    """One version's share of the calls and its state. `gone`: why it must not run."""

    version: str
    weight: float
    gone: str = ""
    quarantined: bool = False


def shares(
    stable: tuple[str, str], canary: tuple[str, str, float] | None, marks: Mapping[str, VersionOverride]
) -> tuple[ReplicaShare, ...]:
    """Versions with their shares of the calls, the stable one first. Weights of those that run add up to 1.

    `stable` is a version and its digest; `canary` is another one with its digest and the file's weight. `marks`
    are keyed by version.
    """
    version, digest = stable
    own = marks.get(version)
    own = own if own is not None and own.digest == digest else None
    first = ReplicaShare(version, 1.0, quarantined=own is not None and own.quarantined)
    if canary is None:
        return (first,)
    name, digest, weight = canary
    mark = marks.get(name)
    if mark is None or mark.digest != digest:
        mark = VersionOverride(digest)
    if mark.gone:
        return first, ReplicaShare(name, 0.0, mark.gone)
    weight = weight if mark.weight is None else mark.weight
    return ReplicaShare(version, 1.0 - weight, quarantined=first.quarantined), ReplicaShare(
        name, weight, "", mark.quarantined
    )


def replicas_of(total: int, parts: Sequence[ReplicaShare]) -> dict[str, int]:
    """Replicas of each version for a model that needs `total` replicas.

    The canary gets its share of the calls, at least one replica; the stable version keeps enough for the rest.
    """
    if not total or len(parts) == 1:
        return {part.version: 0 if part.gone else total for part in parts}
    stable, canary = parts
    if canary.gone:
        return {stable.version: total, canary.version: 0}
    tried = max(1, math.ceil(round(total * canary.weight, 6)))
    kept = max(1, math.ceil(round(total * (1.0 - canary.weight), 6)))
    return {stable.version: kept, canary.version: tried}


def total_for(replicas: int, parts: Sequence[ReplicaShare]) -> int:
    """Inverse of `replicas_of`: the total for which all versions together have `replicas` replicas."""
    return next((n for n in range(replicas + 1) if sum(replicas_of(n, parts).values()) >= replicas), replicas)


def over_types(replicas: int, capacities: Sequence[int], there: Sequence[int] = ()) -> tuple[int, ...]:
    """Replicas on each type of GPU, the preferred type first.

    Replicas listed in `there` keep their type. Others go to the first type with capacity; what fits nowhere waits for
    the preferred type.
    """
    room = [max(capacity, 0) for capacity in capacities]
    counts, left = [], replicas
    for have, most in zip([*there, *[0] * (len(room) - len(there))], room, strict=True):
        counts.append(min(have, most, left))
        left -= counts[-1]
    for at, most in enumerate(room):
        more = min(most - counts[at], left)
        counts[at] += more
        left -= more
    if counts:
        counts[0] += left
    return tuple(counts)
