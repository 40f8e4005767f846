"""The KV mirror: a list of the KV blocks that an engine holds, kept up to date with the engine's events.

Problem: gateways route by prefix hashes, but an engine reports its own block hashes, once when a block is stored and
once when it is removed. The engine has no call that lists its blocks, but a new gateway needs all of them.

An engine may hold several copies of a block, and reports each copy. A block counts as held until its last copy is
removed. Events that contradict the mirror are counted and otherwise ignored. A wrong mirror costs cache misses, but
never causes a wrong answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.api.kv_events import BlockId, BlocksRemoved, BlocksStored, KvEvent
from cluster.policy.kv_cache.changes import KvChange
from cluster.policy.kv_cache.prefix_hashes import EMPTY, Hashes, Prefix, next_prefix, prefix_hashes, seed_of

_SMALL_EVENT = 4
"""Number of blocks in an event up to which hashing one by one is faster than hashing all together."""


@dataclass(slots=True)
class _Block:
    prefix: Prefix
    seed: int
    copies: int = 1


class KvMirror:
    """The KV blocks that one engine holds."""

    def __init__(self, block_size: int) -> None:
        """Create an empty mirror. `block_size`: tokens in a block; blocks of another size are ignored."""
        self._block_size = block_size
        self._blocks: dict[BlockId, _Block] = {}
        self._stored: dict[int, None] = {}
        self._removed: dict[int, None] = {}
        self._was_cleared = False
        self.ignored = 0
        """Number of blocks in events that do not fit: an unknown parent, another size, a removal of an unknown
        block."""

    def __len__(self) -> int:
        return len(self._blocks)

    def apply(self, events: Iterable[KvEvent]) -> None:
        """Apply events, which must be in the engine's order."""
        for event in events:
            if isinstance(event, BlocksStored):
                self._store(event)
            elif isinstance(event, BlocksRemoved):
                self._remove(event)
            else:
                self._blocks.clear()
                self._stored, self._removed = {}, {}
                self._was_cleared = True

    def pop_change(self) -> KvChange:
        """Return the change since the last call: the blocks that were removed, and the blocks that were stored.

        A block that was first stored and then removed is reported as removed, because a gateway may already expect this
        block. A block that was first removed and then stored again is in both lists, so that a gateway can tell why a
        call found this block missing. If the engine has cleared its cache since the last call, the change is a
        `snapshot`.
        """
        stored, removed, was_cleared = self._stored, self._removed, self._was_cleared
        self._stored, self._removed, self._was_cleared = {}, {}, False
        if was_cleared:
            return self.snapshot()
        return KvChange(False, np.array(list(stored), np.uint64), np.array(list(removed), np.uint64))

    def snapshot(self) -> KvChange:
        """Return all blocks that are held, as a change for a gateway that knows no blocks yet."""
        return KvChange(True, self.hashes_of(self._blocks))

    def block_ids(self) -> Sequence[BlockId]:
        """Return the engine's ids of all blocks that are held."""
        return list(self._blocks)

    def hashes_of(self, block_ids: Iterable[BlockId]) -> Hashes:
        """Return the prefix hashes of the blocks in `block_ids`. Blocks that are no longer held are skipped."""
        held = self._blocks
        return np.array([held[block_id].prefix.hash for block_id in block_ids if block_id in held], np.uint64)

    def _store(self, event: BlocksStored) -> None:
        parent = None if event.parent is None else self._blocks.get(event.parent)
        count, size = len(event.blocks), self._block_size
        if (
            event.block_size != size
            or len(event.token_ids) != count * size
            or (event.parent is not None) != bool(parent)
        ):
            self.ignored += count
            return
        seed = seed_of(event.cache_salt, event.adapter) if parent is None else parent.seed
        prefix = EMPTY if parent is None else parent.prefix
        if count <= _SMALL_EVENT:
            for number, block_id in enumerate(event.blocks):
                prefix = next_prefix(event.token_ids[number * size : (number + 1) * size], seed, prefix)
                self._add(block_id, prefix, seed)
        else:
            hashes = prefix_hashes(event.token_ids, size, seed, prefix).tolist()
            for number, block_id in enumerate(event.blocks):
                self._add(block_id, Prefix(hashes[number], prefix.blocks + number + 1), seed)

    def _add(self, block_id: BlockId, prefix: Prefix, seed: int) -> None:
        block = self._blocks.get(block_id)
        if block is not None:
            block.copies += 1
            return
        self._blocks[block_id] = _Block(prefix, seed)
        self._stored[prefix.hash] = None

    def _remove(self, event: BlocksRemoved) -> None:
        for block_id in event.blocks:
            block = self._blocks.get(block_id)
            if block is None:
                self.ignored += 1
                continue
            block.copies -= 1
            if not block.copies:
                del self._blocks[block_id]
                self._stored.pop(block.prefix.hash, None)
                self._removed[block.prefix.hash] = None
