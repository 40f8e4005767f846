"""Prefix hashes: 64-bit hashes of the first 1, 2, 3, ... whole KV blocks of a prompt.

A gateway computes them from the token ids of a prompt, a worker from the KV events of its engine. Equal prefixes have
equal hashes on every gateway and worker if block size, cache salt and adapter are equal. The hashes are only used to
choose a worker: two prefixes with the same hash cost a cache miss, never a wrong answer. So the hash functions are fast
and use no secret.

Method. A block's hash is the sum of its tokens times constants, modulo 2**64 (multilinear hashing, Lemire and Kaser,
"Strongly universal string hashing is fast", 2014). The state after block k is the sum over the blocks up to k of
`_mixed(block hash + k * _STEP + seed)`, so it depends on the order of the blocks. A prefix hash is a state, mixed once
more. The sums need no Python loop over the blocks. Mixing can be undone, so the hashes of further blocks can be
computed from the last prefix hash alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from operator import mul
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
"""Prefix hashes of one prompt, in the order of the blocks."""

_MASK: Final = (1 << 64) - 1
_STEP: Final = np.uint64(0x9E3779B97F4A7C15)
_SHIFT: Final = np.uint64(32)
_FIRST, _SECOND = np.uint64(0xD6E8FEB86659FD93), np.uint64(0xC2B2AE3D27D4EB4F)
_FIRST_INVERSE, _SECOND_INVERSE = (pow(int(factor), -1, 1 << 64) for factor in (_FIRST, _SECOND))


class Prefix(NamedTuple):
    """The first `blocks` blocks of a prompt, identified by their prefix hash. (0, 0) is the empty prefix."""

    hash: int = 0
    blocks: int = 0


EMPTY: Final = Prefix()


def seed_of(cache_salt: str, adapter: str = "") -> int:
    """Return the seed of all prefixes with this cache salt and this adapter digest, in [0, 2**64)."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(f"{len(cache_salt)}:{cache_salt}{adapter}".encode())
    return int.from_bytes(digest.digest(), "little")


def prefix_hashes(
    token_ids: Sequence[int] | npt.NDArray[np.uint32],
    block_size: int,
    seed: int,
    after: Prefix = EMPTY,
) -> Hashes:
    """Return the prefix hashes of the whole blocks of `token_ids`.

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
    hashes += np.uint64(_unmixed(after.hash))
    _mix(hashes)
    return hashes


def next_prefix(token_ids: Sequence[int], seed: int, after: Prefix) -> Prefix:
    """Return the prefix that is one block longer than `after`. `token_ids`: tokens of the added block.

    For one small block this function is faster than `prefix_hashes`, which gives the same hash.
    """
    block = sum(map(mul, token_ids, _weight_numbers(len(token_ids))))
    number = after.blocks + 1
    return Prefix(_mixed(_unmixed(after.hash) + _mixed(block + seed + number * int(_STEP))), number)


def _mix(values: Hashes) -> None:
    """Mix each value in place. The mixing function is invertible and spreads each input bit over all output bits."""
    values ^= values >> _SHIFT
    values *= _FIRST
    values ^= values >> _SHIFT
    values *= _SECOND
    values ^= values >> _SHIFT


def _mixed(value: int) -> int:
    value &= _MASK
    value = (value ^ value >> 32) * int(_FIRST) & _MASK
    value = (value ^ value >> 32) * int(_SECOND) & _MASK
    return value ^ value >> 32


def _unmixed(value: int) -> int:
    """Return the number that `_mixed` turns into `value`."""
    value = (value ^ value >> 32) * _SECOND_INVERSE & _MASK
    value = (value ^ value >> 32) * _FIRST_INVERSE & _MASK
    return value ^ value >> 32


@lru_cache(maxsize=64)
def _weight_numbers(block_size: int) -> list[int]:
    return list(map(int, _weights(block_size)))


@lru_cache(maxsize=64)
def _weights(block_size: int) -> Hashes:
    """Return the odd constants by which the tokens of a block are multiplied."""
    weights = np.arange(1, block_size + 1, dtype=np.uint64) * _STEP
    _mix(weights)
    return weights | np.uint64(1)
