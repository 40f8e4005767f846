"""Choice of a model's version for a call, by the weights of the versions. All gateways choose the same version for the
same call. Pure.

Invariants: while the weights do not change, a call id gets the same version on every gateway and in every repetition.
Over many ids each version gets its share. When the weight of one version grows, some calls move to that version, and
all other calls keep their version.

Source: weighted rendezvous hashing (Schindelhauer and Schomaker 2005; the logarithmic method).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable
from typing import NamedTuple

from cluster.api.frozen import frozen_dataclass
from cluster.api.types import WorkerIdentity


class Build(NamedTuple):
    """What a worker serves: the name of its model's version, and the digests of its tokenizer bundle and weights.

    Workers of one version may differ in both digests while a changed entry of the catalog, with the same version name,
    replaces the replicas."""

    version: str = ""
    bundle_digest: str = ""
    weight_digest: str = ""

    def is_one_of(self, versions: Collection[str], bundle_digest: str, weight_digest: str) -> bool:
        """Return whether the build has one of these versions, and these digests. An empty argument allows all."""
        return (
            (not versions or self.version in versions)
            and (not bundle_digest or bundle_digest == self.bundle_digest)
            and (not weight_digest or weight_digest == self.weight_digest)
        )


@frozen_dataclass
class Versions:
    """Versions on which a call may begin.

    The call begins on `first` if that version has capacity, else on another version of `all`. If both fields are empty,
    the call may begin on any version. `has_begun`: whether a sequence of the call has begun, so that the others must
    begin on the same version, even while that version is being replaced. `bundle_digest`: the tokenizer bundle with
    which the prompt is encoded; only workers with this bundle may get the call. `weight_digest`: the weights on which
    the call has begun. Empty digests allow all.
    """

    first: str = ""
    all: frozenset[str] = frozenset()
    has_begun: bool = False
    bundle_digest: str = ""
    weight_digest: str = ""


ANY_VERSION = Versions()


def begun_on(worker: WorkerIdentity) -> Versions:
    """Return the versions for the other sequences of a call that has begun on a worker."""
    names = frozenset((worker.version,)) if worker.version else frozenset[str]()
    return Versions(worker.version, names, True, worker.bundle_digest, worker.weight_digest)


def choose_version(call_id: str, weights: Iterable[tuple[str, float]]) -> str:
    """Return the version for the call, or "" if no weight is above 0. `weights`: pairs of version and weight."""
    best, lowest = "", math.inf
    for version, weight in weights:
        if weight <= 0:
            continue
        score = -math.log(_unit(f"{call_id}\0{version}")) / weight
        if score < lowest or (score == lowest and version < best):
            best, lowest = version, score
    return best


def _unit(text: str) -> float:
    """Return a hash of the text, as a uniformly distributed number in (0, 1]."""
    return (int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()) + 1) / 2.0**64
