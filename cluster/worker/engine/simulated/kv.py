"""KV blocks with prefix caching, modelled by counts and hashes only.

Problem: space for tokens is finite, and full blocks are shared by all requests with the same prefix and
salt. Invariant: shared + idle + private <= blocks. A block is *shared* while a request holds it. When no
request holds it any more, the block is *idle*: it is free, but still found by its hash until it is
evicted. The oldest idle block is evicted first. A block is *private* if it is not full; such a block is
the last of its request.

Source: vLLM's KVCacheManager and its automatic prefix caching. Hashes are chained, with the salt in the
first hash. A request's last blocks are freed first, so that they are evicted before its first blocks.
Unlike in vLLM, two full blocks with equal content are kept as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from cluster.api.kv_events import BlocksRemoved, BlocksStored, KvEvent


def chain(parent: int, token_ids: Sequence[int]) -> int:
    """Return the hash of a full block together with all blocks before it.

    `parent`: the hash of the previous block; for the first block, the hash of the salt. Python's hash of a tuple of
    ints is the same in every process, and is computed in C.
    """
    return hash((parent, *token_ids))


class KvCache:
    """The blocks of one engine. Callers must `release` all blocks that they have acquired or allocated."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._shared: dict[int, int] = {}
        self._idle: dict[int, None] = {}
        self._private = 0
        self.events: list[KvEvent] | None = None
        """Events since the caller last emptied the list; None while they are not recorded."""

    @property
    def used(self) -> int:
        """Number of blocks that requests hold."""
        return len(self._shared) + self._private

    @property
    def free(self) -> int:
        """Number of blocks that can be allocated, idle blocks included."""
        return self.blocks - self.used

    @property
    def idle(self) -> int:
        """Number of free blocks whose content is still cached."""
        return len(self._idle)

    def match(self, hashes: Iterable[int]) -> int:
        """Return how many blocks at the beginning of `hashes` are cached."""
        cached = 0
        for block in hashes:
            if block not in self._shared and block not in self._idle:
                break
            cached += 1
        return cached

    def acquire(self, hashes: Iterable[int]) -> None:
        """Count one more user of each block in `hashes`. All of the blocks must be in the cache."""
        for block in hashes:
            if block in self._idle:
                del self._idle[block]
                self._shared[block] = 1
            else:
                self._shared[block] += 1

    def allocate(self, count: int) -> bool:
        """Allocate `count` private blocks. Idle blocks are evicted if necessary.

        Returns False and allocates nothing if there are too few blocks.
        """
        if count > self.free:
            return False
        self._private += count
        evicted = []
        while self.used + len(self._idle) > self.blocks:
            evicted.append(next(iter(self._idle)))
            del self._idle[evicted[-1]]
        if evicted and self.events is not None:
            self.events.append(BlocksRemoved(evicted))
        return True

    def commit(self, block: int) -> bool:
        """Turn a private block that is now full into a shared block; return whether its content was not cached before.

        `block`: the block's hash.
        """
        self._private -= 1
        if block in self._shared:
            self._shared[block] += 1
            return False
        is_new = self._idle.pop(block, self) is self
        self._shared[block] = 1
        return is_new

    def release(self, hashes: Sequence[int], private: int) -> None:
        """Release the blocks of a request. `hashes`: hashes of its shared blocks. `private`: number of its private
        blocks."""
        self._private -= private
        for block in reversed(hashes):
            holders = self._shared[block] - 1
            if holders:
                self._shared[block] = holders
            else:
                del self._shared[block]
                self._idle[block] = None

    def __repr__(self) -> str:
        return f"KvCache({self.used} used, {self.idle} idle of {self.blocks})"


class SequenceBlocks:
    """The blocks that one sequence holds: first the full blocks, which are shared, then private blocks."""

    __slots__ = ("_cache", "_hashes", "_held", "_private", "_root", "_salt", "_size")

    def __init__(self, cache: KvCache, size: int, root: int, salt: tuple[str, str] = ("", "")) -> None:
        """Create an object that holds no blocks yet.

        `size`: tokens in a block. `salt`: cache salt and adapter. `root`: hash of `salt`, from which the first block's
        hash is computed.
        """
        self._salt = salt
        self._cache = cache
        self._size = size
        self._root = root
        self._hashes: list[int] = []  # of all full blocks known so far
        self._held = 0  # number of leading `_hashes` that the sequence holds
        self._private = 0

    def acquire_prefix(self, tokens: Sequence[int]) -> int:
        """Hold the cached blocks at the beginning of `tokens`; return the number of tokens in these blocks.

        The block that contains the last token is not held: the last token must be computed, since its logits are
        needed.
        """
        self._hash(tokens, len(tokens))
        cached = self._cache.match(self._hashes[: (len(tokens) - 1) // self._size])
        self._cache.acquire(self._hashes[:cached])
        self._held = cached
        return cached * self._size

    def _hash(self, tokens: Sequence[int], end: int) -> None:
        size, hashes = self._size, self._hashes
        for at in range(len(hashes), end // size):
            parent = hashes[-1] if hashes else self._root
            hashes.append(chain(parent, tokens[at * size : (at + 1) * size]))

    def grow(self, tokens: Sequence[int], end: int) -> bool:
        """Hold enough blocks for the first `end` tokens of `tokens`. Blocks that become full are shared with other
        sequences.

        Returns False and changes nothing if the cache has too few free blocks.
        """
        missing = -(-end // self._size) - self._held - self._private
        if missing > 0:
            if not self._cache.allocate(missing):
                return False
            self._private += missing
        full = end // self._size
        if full > self._held:
            self._hash(tokens, end)
            committed = range(self._held, full)
            new = [number for number in committed if self._cache.commit(self._hashes[number])]
            if self._cache.events is not None:
                self._cache.events += self._stored(tokens, new)
            self._private -= full - self._held
            self._held = full
        return True

    def _stored(self, tokens: Sequence[int], new: Sequence[int]) -> Iterator[BlocksStored]:
        """Yield one event for each run of consecutive new blocks. `new`: positions of the new blocks, in order."""
        while new:
            first, count = new[0], 1
            while count < len(new) and new[count] == first + count:
                count += 1
            new = new[count:]
            end = first + count
            parent = self._hashes[first - 1] if first else None
            token_ids = tokens[first * self._size : end * self._size]
            yield BlocksStored(self._hashes[first:end], parent, token_ids, self._size, *self._salt)

    def release(self) -> None:
        """Release all blocks. Idempotent."""
        self._cache.release(self._hashes[: self._held], self._private)
        self._held = self._private = 0
