"""KV blocks of one simulated engine: a prefix cache with reference counts and LRU eviction.

Blocks are named by prefix hashes, so equal names mean equal prefixes. Blocks without references are evicted in vLLM's
order: the block that was released longest ago first, and among the blocks of one call, the last block of the prompt
first. Blocks of outputs, and of prompts that are being computed, have no name; they take space until they are released.

PooledLru is one cache as large as all workers' caches together. Its hits are the reference for the workers' hits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from cluster.policy.kv_cache.changes import KvChange


class BlockCache:
    """The KV blocks of one engine. The number of used blocks never exceeds `capacity`."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._references: dict[int, int] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._unnamed = 0
        self._changed: dict[int, bool] = {}

    @property
    def usage(self) -> float:
        """Share of the blocks that calls use, in [0, 1]. As in vLLM, cached blocks without a call do not count."""
        return (len(self._references) + self._unnamed) / self.capacity

    @property
    def pinned(self) -> int:
        """Number of blocks that calls use."""
        return len(self._references) + self._unnamed

    @property
    def has_changed(self) -> bool:
        """Whether blocks have changed since the last `pop_change`."""
        return bool(self._changed)

    def __len__(self) -> int:
        """Number of blocks whose content is known, whether or not a call uses them now. Blocks that a call still
        computes do not count."""
        return len(self._references) + len(self._evictable)

    def match(self, names: Sequence[int]) -> int:
        """Return how many leading blocks of `names` are held."""
        count = 0
        for name in names:
            if name not in self._references and name not in self._evictable:
                break
            count += 1
        return count

    def acquire(self, names: Sequence[int], most: int, blocks: int) -> int | None:
        """Take the blocks of a call: leading blocks that are held, and space for the others. `names`: whole blocks of
        the prompt. `most`: how many of these may be reused. `blocks`: number of blocks for prompt and output. Returns
        the number of reused blocks, or None if there is not enough space."""
        matched = self.match(names[:most])
        used = {name for name in names[:matched] if name not in self._references}
        if len(self._references) + len(used) + self._unnamed + blocks - matched > self.capacity:
            return None
        for name in names[:matched]:
            self._pin(name)
        self._unnamed += blocks - matched
        while len(self._references) + len(self._evictable) + self._unnamed > self.capacity:
            self._note(self._evictable.popitem(last=False)[0], False)
        return matched

    def commit(self, names: Iterable[int]) -> None:
        """Give names to computed blocks of a call. If the cache already holds a block of the same name, the call shares
        that block, and the call's own copy is freed."""
        for name in names:
            self._unnamed -= 1
            if name not in self._references and name not in self._evictable:
                self._note(name, True)
            self._pin(name)

    def release(self, names: Sequence[int], unnamed: int) -> None:
        """Release the blocks of a call. `names`: names of its blocks that can be shared. `unnamed`: number of its other
        blocks, which are freed."""
        self._unnamed -= unnamed
        for name in reversed(names):
            self._references[name] -= 1
            if not self._references[name]:
                del self._references[name]
                self._evictable[name] = None

    def pop_change(self) -> KvChange:
        """Return which blocks were stored and which were removed since the last call of this method."""
        changed, self._changed = self._changed, {}
        return KvChange(
            stored=np.array([name for name, held in changed.items() if held], np.uint64),
            removed=np.array([name for name, held in changed.items() if not held], np.uint64),
        )

    def snapshot(self) -> KvChange:
        """Return all blocks in the cache that have a name (a hash of their content), as a report that replaces all
        earlier reports."""
        return KvChange(is_reset=True, stored=np.array([*self._references, *self._evictable], np.uint64))

    def _pin(self, name: int) -> None:
        self._evictable.pop(name, None)
        self._references[name] = self._references.get(name, 0) + 1

    def _note(self, name: int, held: bool) -> None:
        if self._changed.get(name, held) != held:
            del self._changed[name]
        else:
            self._changed[name] = held

    def __repr__(self) -> str:
        return f"BlockCache({self.pinned} pinned, {len(self._evictable)} evictable of {self.capacity})"


class PooledLru:
    """One LRU cache as large as all workers' caches together. Its hits are the reference for the workers' hits. A
    prompt is stored when it arrives, so no hit is lost to a delay. Running calls do not protect their blocks from
    eviction."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._names: OrderedDict[int, None] = OrderedDict()

    def use(self, names: Sequence[int], most: int = 0) -> int:
        """Store a prompt's blocks as the most recently used ones. Return how many of its first `most` blocks, counted
        from the start without a gap, were already in the cache."""
        matched = 0
        for name in names[:most]:
            if name not in self._names:
                break
            matched += 1
        for name in reversed(names):
            self._names[name] = None
            self._names.move_to_end(name)
        while len(self._names) > self._capacity:
            self._names.popitem(last=False)
        return matched
