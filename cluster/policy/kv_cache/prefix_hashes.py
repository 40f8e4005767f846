"""Prefix hashes: 64-bit hashes of the first 1, 2, 3, ... whole KV blocks of a prompt.

A gateway computes them from the token ids of a prompt, a worker from the KV events of its engine. Equal prefixes have
equal hashes on every gateway and worker if block size, cache salt and adapter are equal. The hashes choose a worker and
carry no trust: two prefixes with one hash cost a cache miss, never a wrong answer. So the hash functions are fast ones
without secrets.

Method. A block's hash is the sum of its tokens times constants, modulo 2**64 (multilinear hashing, Lemire and Kaser,
"Strongly universal string hashing is fast", 2014). The state after block k is the sum over the blocks up to k of
`_mixed(block hash + k * _STEP + seed)`, so it depends on the order of the blocks. A prefix hash is a state, mixed once
more. Sums need no loop over the blocks, and a state is enough to continue a prompt that has grown.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
"""Prefix hashes of one prompt, in the order of the blocks."""

_MASK: Final = (1 << 64) - 1
_STEP: Final = np.uint64(0x9E3779B97F4A7C15)
_SHIFT: Final = np.uint64(32)
_FIRST, _SECOND = np.uint64(0xD6E8FEB86659FD93), np.uint64(0xC2B2AE3D27D4EB4F)


@dataclass(frozen=True, slots=True)
class PrefixState:
    """State after the first `blocks` blocks of a prompt. `total`: the sum of their mixed hashes."""

    total: int = 0
    blocks: int = 0


def seed_of(cache_salt: str, adapter: str = "") -> int:
    """Return the seed of all prefixes with this cache salt and this adapter digest, in [0, 2**64)."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(f"{len(cache_salt)}:{cache_salt}{adapter}".encode())
    return int.from_bytes(digest.digest(), "little")


def prefix_hashes(
    token_ids: Sequence[int] | npt.NDArray[np.uint32],
    block_size: int,
    seed: int,
    after: PrefixState = PrefixState(),
) -> tuple[Hashes, PrefixState]:
    """Return the prefix hashes of the whole blocks of `token_ids`, and the state after the last of these blocks.

    `token_ids`: ids in [0, 2**32), best as an array or `array("I")`. They follow the blocks of `after`; tokens after
    the last whole block are ignored. `block_size`: tokens in a block.
    """
    ids = np.asarray(token_ids, np.uint32)
    count = len(ids) // block_size
    tokens = ids[: count * block_size].reshape(count, block_size).astype(np.uint64)
    hashes = tokens @ _weights(block_size)
    first = np.uint64((seed + (after.blocks + 1) * int(_STEP)) & _MASK)
    hashes += np.arange(count, dtype=np.uint64) * _STEP + first
    _mix(hashes)
    np.cumsum(hashes, out=hashes)
    hashes += np.uint64(after.total)
    end = PrefixState(int(hashes[-1]), after.blocks + count) if count else after
    _mix(hashes)
    return hashes, end


def _mix(values: Hashes) -> None:
    """Mix each value in place: an invertible function that spreads each bit over all bits."""
    values ^= values >> _SHIFT
    values *= _FIRST
    values ^= values >> _SHIFT
    values *= _SECOND
    values ^= values >> _SHIFT


@lru_cache(maxsize=64)
def _weights(block_size: int) -> Hashes:
    """Return the odd constants by which the tokens of a block are multiplied."""
    weights = np.arange(1, block_size + 1, dtype=np.uint64) * _STEP
    _mix(weights)
    return weights | np.uint64(1)
