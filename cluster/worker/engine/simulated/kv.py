"""KV blocks with prefix caching, as counts and hashes alone.

Problem: the room for tokens is finite, and full blocks are shared by all requests that begin alike under one salt.
Invariant: shared + idle + private <= blocks; a block is *shared* while someone holds it, *idle* (free, but still to
be found by its hash) after that until it is evicted, oldest first; *private* blocks are a request's unfilled tail.
Source: vLLM's KVCacheManager (automatic prefix caching: chained hashes, the salt in the first; freed tail first so
that the tail is evicted before the head). Unlike vLLM, equal blocks that were filled twice are kept once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def chain(parent: int, token_ids: Sequence[int]) -> int:
    """Hash of one full block and all before it; `parent` is the block before, or the salt's root.

    Python's hash of a tuple of ints does not depend on the process, and runs in C.
    """
    return hash((parent, *token_ids))


class KvCache:
    """The blocks of one engine. Callers pair every acquire, allocate and commit with one release."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._shared: dict[int, int] = {}
        self._idle: dict[int, None] = {}
        self._private = 0

    @property
    def used(self) -> int:
        """Blocks somebody holds."""
        return len(self._shared) + self._private

    @property
    def free(self) -> int:
        """Blocks that can be had, idle ones included."""
        return self.blocks - self.used

    @property
    def idle(self) -> int:
        """Free blocks whose content can still be found."""
        return len(self._idle)

    def match(self, hashes: Iterable[int]) -> int:
        """How many leading blocks are cached."""
        found = 0
        for block in hashes:
            if block not in self._shared and block not in self._idle:
                break
            found += 1
        return found

    def acquire(self, hashes: Iterable[int]) -> None:
        """Hold cached blocks (all of them must be: see match)."""
        for block in hashes:
            if block in self._idle:
                del self._idle[block]
                self._shared[block] = 1
            else:
                self._shared[block] += 1

    def allocate(self, count: int) -> bool:
        """Take `count` private blocks, evicting idle ones; False and nothing taken where there is no room."""
        if count > self.free:
            return False
        self._private += count
        while self.used + len(self._idle) > self.blocks:
            del self._idle[next(iter(self._idle))]
        return True

    def commit(self, block: int) -> None:
        """One private block is full and has this hash from now on."""
        self._private -= 1
        if block in self._shared:
            self._shared[block] += 1
        else:
            self._idle.pop(block, None)
            self._shared[block] = 1

    def release(self, hashes: Sequence[int], private: int) -> None:
        """Give back what was held."""
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
