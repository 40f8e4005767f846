"""The versions of one model: which versions run, their shares of the calls, and their numbers of replicas. Pure.

A mark overrides what the catalog file says about a version. An operator sets a mark to roll back a canary or to change
the canary's share of the calls. A canary that performs badly gets a mark automatically.

The digest of a version covers everything that its replicas are started with, and a mark applies only to one digest. A
corrected version has another digest. So it is tried again, and the mark need not be removed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class VersionOverride:
    """Override of what the catalog file says about one version of a model.

    `digest` identifies the replicas that the override applies to. `weight` None: the weight in the file applies.
    `gone`: the reason why the version must not run at all, or "". `quarantined`: the version runs without calls.
    """

    digest: str
    weight: float | None = None
    gone: str = ""
    quarantined: bool = False

    def as_json(self) -> dict[str, object]:
        """Return the override as plain JSON values; `from_json` is the inverse."""
        return {"digest": self.digest, "weight": self.weight, "gone": self.gone, "quarantined": self.quarantined}

    @staticmethod
    def from_json(values: Mapping[str, object]) -> VersionOverride:
        """Return the override from JSON values; the inverse of `as_json`. Raises ValueError for an invalid weight."""
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
    """One version's share of the calls (`weight`, in [0, 1]) and its state.

    `gone`: the reason why the version must not run, or "". `quarantined`: the version runs without calls.
    """

    version: str
    weight: float
    gone: str = ""
    quarantined: bool = False


def shares(
    stable: tuple[str, str], canary: tuple[str, str, float] | None, marks: Mapping[str, VersionOverride]
) -> tuple[ReplicaShare, ...]:
    """Return the share of a model's calls that each version gets, the stable version first. The weights of all
    running versions add up to 1.

    `stable`: the stable version and its digest. `canary`: the canary version, its digest and its weight in the
    configuration file. `marks`: operators' overrides, by version.
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
    """Return the number of replicas of each version, for a model that needs `total` replicas.

    The canary gets its share of the replicas, but at least one. The stable version keeps enough replicas for the rest
    of the calls.
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
    """Return the smallest `total` for which `replicas_of(total, parts)` gives all versions together at least `replicas`
    replicas."""
    return next((n for n in range(replicas + 1) if sum(replicas_of(n, parts).values()) >= replicas), replicas)


def over_types(replicas: int, capacities: Sequence[int], there: Sequence[int] = ()) -> tuple[int, ...]:
    """Divide `replicas` over the GPU types. Returns the number for each type.

    `capacities`: number of replicas that fit on each type, the preferred type first. `there`: number of existing
    replicas on each type, in the same order. Existing replicas keep their type. Other replicas go to the first type
    with capacity. Replicas that fit on no type are added to the preferred type.
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
