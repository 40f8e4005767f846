"""Choice of a model's version for a call, by the versions' weights; equal for the same call on every gateway. Pure.

Invariants: while the weights stay the same, a call id always gets the same version, on whichever gateway and however
often it is repeated. Over many ids each version gets its share. When a weight grows, the only calls that change their
version are those that the growing version gains.

Source: weighted rendezvous hashing (Schindelhauer and Schomaker 2005; the logarithmic method).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Versions:
    """Versions on which a call may begin: `first` if it has capacity, else another of `all`; any if both are empty."""

    first: str = ""
    all: frozenset[str] = frozenset()


def choose_version(call_id: str, weights: Iterable[tuple[str, float]]) -> str:
    """The version for this call; "" if no weight is above 0."""
    best, lowest = "", math.inf
    for version, weight in weights:
        if weight <= 0:
            continue
        score = -math.log(_unit(f"{call_id}\0{version}")) / weight
        if score < lowest or (score == lowest and version < best):
            best, lowest = version, score
    return best


def _unit(text: str) -> float:
    """Hash of the text as a uniformly distributed number in (0, 1]."""
    return (int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()) + 1) / 2.0**64
