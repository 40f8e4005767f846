"""Rendezvous hashing: each key prefers one worker. When a worker leaves, only the keys that preferred it move to
others.

Source: Thaler and Ravishankar, "Using name-based mappings to increase hit rates", IEEE/ACM ToN 6(1), 1998. The mixing
function is the finalizer of SplitMix64 (Steele, Lea and Flood 2014), which numpy computes for many workers at once.
"""

from __future__ import annotations

import hashlib
from typing import Final

MULTIPLIERS: Final = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS: Final = (30, 27, 31)
FRACTION_BITS: Final = 53
_MASK: Final = (1 << 64) - 1


def hash64(text: str) -> int:
    """Return the 64-bit hash of a text as a number in [0, 2**64). The hash is equal in all processes."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest())


def mix64(number: int) -> int:
    """Return a bijective hash of a number in [0, 2**64)."""
    number = ((number ^ (number >> SHIFTS[0])) * MULTIPLIERS[0]) & _MASK
    number = ((number ^ (number >> SHIFTS[1])) * MULTIPLIERS[1]) & _MASK
    return number ^ (number >> SHIFTS[2])


def preference(key: int, worker: int) -> float:
    """Return how much a key prefers a worker, in [0, 1). `key` and `worker`: hashes in [0, 2**64)."""
    return (mix64(key ^ worker) >> (64 - FRACTION_BITS)) / float(1 << FRACTION_BITS)
