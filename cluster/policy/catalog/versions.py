"""A model's versions beside each other: which of them run, with which part of the calls and how many replicas. Pure.

What a file says of a version can be set aside for a time: an operator takes a trial back, or gives it another part of
the calls, and a trial that does badly takes itself back. Such a mark holds for exactly what it was made for (the digest
of what the version's replicas are started with), so that a mended version is tried anew without anybody lifting it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class VersionMark:
    """What is different from the file for a version. `digest`: of the replicas that it is about.

    `weight` None: the file's. `gone`: why it is not to run at all. `quarantined`: it runs and gets no call.
    """

    digest: str
    weight: float | None = None
    gone: str = ""
    quarantined: bool = False

    def as_json(self) -> dict[str, object]:
        """`from_json` is the inverse."""
        return {"digest": self.digest, "weight": self.weight, "gone": self.gone, "quarantined": self.quarantined}

    @staticmethod
    def from_json(values: Mapping[str, object]) -> VersionMark:
        """Raises ValueError for what `as_json` does not write."""
        weight = values.get("weight")
        if not isinstance(weight, (int, float, type(None))):
            raise ValueError(f"weight: {weight!r}")
        return VersionMark(
            digest=str(values.get("digest", "")),
            weight=None if weight is None else float(weight),
            gone=str(values.get("gone", "")),
            quarantined=bool(values.get("quarantined", False)),
        )


@dataclass(frozen=True, slots=True)
class ReplicaShare:
    """One version's part of the calls, and how it stands. `gone`: why it is not to run."""

    version: str
    weight: float
    gone: str = ""
    quarantined: bool = False


def shares(
    stays: tuple[str, str], trial: tuple[str, str, float] | None, marks: Mapping[str, VersionMark]
) -> tuple[ReplicaShare, ...]:
    """The versions with their parts of the calls, the one that stays first. `stays` is a version and its digest,
    `trial` has the file's weight too; `marks` are by version. Weights of those that run add up to 1."""
    version, digest = stays
    own = marks.get(version)
    own = own if own is not None and own.digest == digest else None
    first = ReplicaShare(version, 1.0, quarantined=own is not None and own.quarantined)
    if trial is None:
        return (first,)
    name, digest, weight = trial
    mark = marks.get(name)
    if mark is None or mark.digest != digest:
        mark = VersionMark(digest)
    if mark.gone:
        return first, ReplicaShare(name, 0.0, mark.gone)
    weight = weight if mark.weight is None else mark.weight
    return ReplicaShare(version, 1.0 - weight, quarantined=first.quarantined), ReplicaShare(
        name, weight, "", mark.quarantined
    )


def replicas_of(total: int, parts: Sequence[ReplicaShare]) -> dict[str, int]:
    """How many replicas of each version, for a model that is to have `total`: a trial has room for its part of the
    calls, at least one replica, and the one that stays keeps room for the rest."""
    if not total or len(parts) == 1:
        return {part.version: 0 if part.gone else total for part in parts}
    stays, trial = parts
    if trial.gone:
        return {stays.version: total, trial.version: 0}
    tried = max(1, math.ceil(round(total * trial.weight, 6)))
    kept = max(1, math.ceil(round(total * (1.0 - trial.weight), 6)))
    return {stays.version: kept, trial.version: tried}


def total_of(replicas: int, parts: Sequence[ReplicaShare]) -> int:
    """For how many in all there are so many replicas of all versions together: `replicas_of` the other way round."""
    return next((n for n in range(replicas + 1) if sum(replicas_of(n, parts).values()) >= replicas), replicas)


def over_types(replicas: int, capacities: Sequence[int], there: Sequence[int] = ()) -> tuple[int, ...]:
    """How many on each type of GPU, the first choice first: what is `there` stays there; others come to the first type
    that holds them. What fits nowhere waits for the first choice."""
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
