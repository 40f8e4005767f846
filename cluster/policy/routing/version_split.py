"""Which of a model's versions a call goes to: by their weights, the same for the same call at every gateway. Pure.

Invariants: with weights that stay, a call of the same id always meets the same version, whichever gateway it comes to
and however often it is repeated; over many ids each version gets its part; and when a weight grows, no call leaves a
version for another but those that the growing version gains.
Source: weighted rendezvous hashing (Schindelhauer and Schomaker 2005; the logarithmic method).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Versions:
    """Where a call may begin: `first` if it has room, else another of `all`; none named: anywhere."""

    first: str = ""
    all: frozenset[str] = frozenset()


def choose(call_id: str, weights: Iterable[tuple[str, float]]) -> str:
    """The version for this call; "" where none has a weight above 0."""
    best, lowest = "", math.inf
    for version, weight in weights:
        if weight <= 0:
            continue
        score = -math.log(_unit(f"{call_id}\0{version}")) / weight
        if score < lowest or (score == lowest and version < best):
            best, lowest = version, score
    return best


def _unit(text: str) -> float:
    """In (0, 1], as if drawn evenly."""
    return (int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()) + 1) / 2.0**64
