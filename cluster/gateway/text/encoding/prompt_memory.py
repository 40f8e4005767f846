"""Memory of encoded blocks of prompts, separate for each tenant. A block's digest gives the block's token ids.

The next prompt of a conversation begins with the blocks of the previous prompt, and other conversations of a
tenant begin with the same system prompt. The memory returns the ids of these blocks, so that only the new text is
encoded. No text is kept.

A tenant finds only its own blocks, so timing reveals nothing about the texts of other tenants. When the memory is
full, tenants that have used none of their blocks for IDLE_S lose blocks first. After them, the tenant with the most
bytes loses blocks, those that it used longest ago first. So an active tenant whose blocks take less than an equal
share of the memory loses none.
"""

from __future__ import annotations

import time
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Final

PackedIds = bytes
"""Token ids as uint32 in native byte order."""
MAX_BYTES: Final = 192 << 20
"""Default size of the memory of one gateway. It holds a thousand conversations of 77,000 tokens."""
IDLE_S: Final = 3600.0
ENTRY_BYTES: Final = 320
"""Bytes that one entry takes besides its ids: the digest, the objects that hold the ids, and the tables."""
EVICTED_AT_ONCE: Final = 8
"""Number of blocks that a tenant loses before the tenant with the most bytes is determined again."""
MAX_IDS: Final = 1 << 24
"""Largest vocabulary whose ids can be packed."""
Planes = tuple[bytes, bytes]
"""Packed ids in two parts. The first part has the low bytes of all ids, then the second bytes of all ids. The second
part has the compressed third bytes, or is b"" if all third bytes are 0. An id of a vocabulary of 128,000 thus takes two
bytes and about an eighth."""


class _Share:
    """The blocks of one tenant, in order of their last use, the oldest first."""

    __slots__ = ("blocks", "bytes", "used_at")

    def __init__(self) -> None:
        self.blocks: OrderedDict[bytes, Planes] = OrderedDict()
        self.bytes = 0
        self.used_at = 0.0

    def drop_oldest(self) -> int:
        """Remove the block that was used longest ago. Returns its size in bytes."""
        _, planes = self.blocks.popitem(last=False)
        size = _size(planes)
        self.bytes -= size
        return size


class PromptMemory:
    """The token ids of text blocks that one gateway has encoded before, by tenant, for all models. Thread-safe."""

    def __init__(self, max_bytes: int = MAX_BYTES, now: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._now = now
        self._shares: OrderedDict[str, _Share] = OrderedDict()
        """The blocks of each tenant. The tenants are in order of their last use of a block, the oldest first."""
        self._lock = Lock()
        self.bytes = 0
        """Current size in bytes, with the tables."""

    def bytes_of(self, tenant: str) -> int:
        """Return the size in bytes of a tenant's blocks."""
        share = self._shares.get(tenant)
        return 0 if share is None else share.bytes

    def get(self, tenant: str, digests: Sequence[bytes]) -> list[Planes | None]:
        """Return the packed ids of a tenant's blocks; None for each unknown block."""
        with self._lock:
            share = self._shares.get(tenant)
            if share is None:
                return [None] * len(digests)
            self._mark_used(tenant, share)
            blocks = share.blocks
            found = [blocks.get(digest) for digest in digests]
            for digest, planes in zip(digests, found, strict=True):
                if planes is not None:
                    blocks.move_to_end(digest)
            return found

    def put(self, tenant: str, items: Sequence[tuple[bytes, Planes]]) -> None:
        """Remember the token ids of a tenant's text blocks. `items`: digest and token ids of each block."""
        if not items:
            return
        with self._lock:
            share = self._shares.setdefault(tenant, _Share())
            self._mark_used(tenant, share)
            for digest, planes in items:
                if digest not in share.blocks:
                    share.blocks[digest] = planes
                    share.bytes += (size := _size(planes))
                    self.bytes += size
            self._shrink()

    def _mark_used(self, tenant: str, share: _Share) -> None:
        share.used_at = self._now()
        self._shares.move_to_end(tenant)

    def _shrink(self) -> None:
        while self.bytes > self._max_bytes:
            tenant, share = next(iter(self._shares.items()))
            if share.used_at > self._now() - IDLE_S:
                tenant, share = max(self._shares.items(), key=lambda item: item[1].bytes)
            for _ in range(EVICTED_AT_ONCE):
                if share.blocks and self.bytes > self._max_bytes:
                    self.bytes -= share.drop_oldest()
            if not share.blocks:
                del self._shares[tenant]


def _size(planes: Planes) -> int:
    low, high = planes
    return len(low) + len(high) + ENTRY_BYTES


def pack(ids: PackedIds) -> Planes:
    """Return token ids in packed form (Planes). The ids must be below MAX_IDS."""
    high = ids[2::4]
    return ids[0::4] + ids[1::4], zlib.compress(high, 1) if any(high) else b""


def unpack(blocks: Sequence[Planes], prefix: PackedIds = b"", suffix: PackedIds = b"") -> array[int]:
    """Return the ids of several packed blocks in order, with the ids `prefix` before them and `suffix` after them."""
    count = sum(len(low) for low, _ in blocks) // 2
    ids = bytearray(4 * count)
    ids[0::4] = b"".join([low[: len(low) // 2] for low, _ in blocks])
    ids[1::4] = b"".join([low[len(low) // 2 :] for low, _ in blocks])
    if any(high for _, high in blocks):
        ids[2::4] = b"".join([zlib.decompress(high) if high else bytes(len(low) // 2) for low, high in blocks])
    packed = array("I")
    packed.frombytes(prefix + ids + suffix if prefix or suffix else ids)
    return packed
