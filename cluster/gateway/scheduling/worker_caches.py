"""The KV blocks that workers hold, as far as this gateway knows: a cache index for each model.

Workers of one model may have blocks of different sizes. Each size has an index of its own, since prefix hashes depend
on the size.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Final

from cluster.api.types import KV_EVENTS, EngineRequest
from cluster.gateway.links.worker_link import WorkerLink
from cluster.link.v1 import link_pb2 as pb
from cluster.policy.routing.hot_prefixes import HotPrefixes
from cluster.wire.codecs.codec import check_kv_blocks

if TYPE_CHECKING:
    from cluster.policy.kv_cache.index import CacheIndex
    from cluster.policy.kv_cache.prefix_hashes import Hashes
    from cluster.policy.kv_cache.prompt_hashes import PromptHashes

EXPECTED_S: Final = 10.0
"""Seconds for which a worker is expected to hold the blocks of a prompt that was sent to it, if it does not report
them."""
MAX_BLOCKS: Final = 1 << 24
"""Maximum number of different blocks in an index."""
BATCH_BYTES: Final = 4 * 1024
"""If the waiting reports of a worker reach this total size, they are applied. Smaller reports wait and are applied
together, since each change of an index has a fixed cost. A call that reads the index first applies some of the small
reports."""
APPLIED_AT_ONCE: Final = 16
"""Number of workers whose small reports a call applies before it reads the index, which takes about a millisecond. The
reports of further workers are applied later, so that the cost of a call does not grow with the number of workers."""
MAX_WAITING_BYTES: Final = 8 << 20
"""Maximum total size of a worker's waiting reports. Above this size, a batch of the reports is applied at once. While
numpy is not imported yet, all of the worker's waiting reports are dropped instead."""
SEGMENTS: Final = 16
"""Number of segments of an index from which one call of `maintain` removes departed workers."""
MIN_TOKENS: Final = 512
"""Number of prompt tokens from which a call is routed by its prefix. Computing a shorter prompt takes about as long as
reading the index, and routing by load alone spreads shorter prompts better."""
MAX_PROMPTS: Final = 512
"""Number of prompts whose hashes are remembered while they wait."""

_IndexKey = tuple[str, int]


@dataclass(slots=True)
class _Unapplied:
    """Reports of a worker that are not in the index yet. `size`: total size in bytes of the hashes in these reports."""

    link: WorkerLink
    messages: deque[pb.KvBlocks] = field(default_factory=deque)
    size: int = 0

    def pop_batch(self) -> Sequence[pb.KvBlocks]:
        """Remove and return the first reports, up to the size of a batch."""
        batch, size = list[pb.KvBlocks](), 0
        while self.messages and size < BATCH_BYTES:
            batch.append(message := self.messages.popleft())
            size += len(message.stored) + len(message.removed)
        self.size -= size
        return batch


class WorkerCaches:
    """The cache indexes of one gateway.

    A large report, such as a report of all blocks of a worker, is applied in batches, one in each pass of the event
    loop. So the loop is never blocked for longer than one batch takes, however many workers connect at once.
    """

    def __init__(self) -> None:
        self._indexes: dict[_IndexKey, CacheIndex] = {}
        self._unapplied: dict[str, _Unapplied] = {}
        self._due: dict[str, None] = {}
        """Names of the links whose reports are applied next, in this order."""
        self.needs_modules = asyncio.Event()
        """Set when a worker has reported blocks while numpy, which the indexes need, is not imported yet."""
        self._hashes: OrderedDict[tuple[str, int], Hashes] = OrderedDict()
        self._earlier: PromptHashes | None = None
        self._prefixes: OrderedDict[str, int] = OrderedDict()
        """Hash of the longest cached prefix of each waiting sequence, by the sequence's key."""
        self._hot = HotPrefixes()

    def report(self, link: WorkerLink, message: pb.KvBlocks) -> None:
        """Accept a worker's report of its KV blocks, which is applied later. Raises ValueError for a malformed
        report."""
        if KV_EVENTS not in link.info.capabilities:
            return
        size = check_kv_blocks(message)  # now, since an error must end this link and not a later call
        unapplied = self._unapplied.get(link.name)
        if unapplied is None:
            unapplied = self._unapplied[link.name] = _Unapplied(link)
        unapplied.messages.append(message)
        unapplied.size += size
        if "numpy" in sys.modules:  # otherwise deferred_imports.py imports it soon, without blocking the event loop
            if unapplied.size > MAX_WAITING_BYTES:
                self._apply(unapplied)
            if unapplied.size >= BATCH_BYTES or message.is_reset:
                self._apply_soon(link.name)
        elif size:
            self.needs_modules.set()
            if unapplied.size > MAX_WAITING_BYTES:
                unapplied.messages.clear()
                unapplied.size = 0

    def _apply_soon(self, name: str) -> None:
        if not self._due:
            asyncio.get_running_loop().call_soon(self._apply_due)
        self._due[name] = None

    def _apply_due(self) -> None:
        """Apply one batch of a worker's reports of KV blocks. The workers whose reports are due take turns."""
        name = next(iter(self._due))
        try:
            if (unapplied := self._unapplied.get(name)) is not None:
                self._apply(unapplied)
        finally:
            del self._due[name]
            if name in self._unapplied:
                self._due[name] = None
            if self._due:
                asyncio.get_running_loop().call_soon(self._apply_due)

    def _apply(self, unapplied: _Unapplied) -> None:
        """Apply one batch of a worker's reports, without the changes that cancel each other out."""
        from cluster.policy.kv_cache.index import CacheIndex  # not at the start: deferred_imports.py
        from cluster.wire.codecs.kv_codec import joined_changes, kv_blocks_from_pb

        link = unapplied.link
        change, worker = joined_changes(list(map(kv_blocks_from_pb, unapplied.pop_batch()))), link.identity.worker_id
        if not unapplied.messages:
            del self._unapplied[link.name]
        key = (link.identity.model, link.info.block_size)
        index = self._indexes.get(key)
        if index is None:
            index = self._indexes[key] = CacheIndex(MAX_BLOCKS, secrets.randbits(64))
        if change.is_reset:
            index.add_worker(worker)
        index.remove(worker, change.removed)
        index.store(worker, change.stored)

    def _apply_small(self, model: str) -> None:
        """Apply the small KV block reports of at most APPLIED_AT_ONCE workers of a model. The reports of the remaining
        workers are applied in the next passes of the event loop."""
        if "numpy" not in sys.modules:
            return
        waiting = [each for each in self._unapplied.values() if each.link.identity.model == model]
        for number, unapplied in enumerate(waiting):
            if number < APPLIED_AT_ONCE and unapplied.size < BATCH_BYTES:
                self._apply(unapplied)
            else:
                self._apply_soon(unapplied.link.name)

    def forget(self, link: WorkerLink) -> None:
        """Forget the blocks of a worker whose link has ended."""
        self._unapplied.pop(link.name, None)
        key = (link.identity.model, link.info.block_size)
        if (index := self._indexes.get(key)) is not None:
            index.remove_worker(link.identity.worker_id)
            if not index.workers:
                del self._indexes[key]

    def cached_tokens(self, model: str, key: str, request: EngineRequest) -> Mapping[str, int] | None:
        """Return, by worker id, how many leading tokens of a prompt each worker of a model holds, in ascending order of
        these numbers. Workers that hold none are left out. The last token of a prompt does not count, because it is
        always computed. Returns None for a short prompt, and if no worker of the model reports its blocks. `key`: key
        of the sequence."""
        out: dict[str, int] | None = None
        longest = 0
        if len(request.prompt_token_ids) < MIN_TOKENS:
            return out
        self._apply_small(model)
        for (name, block_size), index in self._indexes.items():
            if name == model:
                out = {} if out is None else out
                hashes = self._prompt_hashes(key, block_size, request)
                hashes = hashes[: (len(request.prompt_token_ids) - 1) // block_size]
                matched = index.match(hashes)
                is_sorted = not out
                for worker, blocks in matched.items():
                    out[worker] = blocks * block_size
                if matched and (most := max(matched.values())) * block_size > longest:
                    longest = most * block_size
                    self._prefixes[key] = int(hashes[most - 1])
                if not is_sorted:  # workers with blocks of another size
                    out = dict(sorted(out.items(), key=itemgetter(1)))
        if not longest:
            self._prefixes.pop(key, None)
        elif len(self._prefixes) > MAX_PROMPTS:
            self._prefixes.popitem(last=False)
        return out

    def sharing(self, key: str, now: float) -> float:
        """Return the approximate number of recently sent sequences that share the longest cached prefix of a waiting
        sequence."""
        prefix = self._prefixes.get(key)
        return 0.0 if prefix is None else self._hot.recent(prefix, now)

    def forget_prompt(self, key: str) -> None:
        """Forget the prompt hashes of the waiting sequence `key`, because its adapter has changed. The hashes depend on
        the adapter."""
        for known in [known for known in self._hashes if known[0] == key]:
            del self._hashes[known]
        self._prefixes.pop(key, None)

    def expect(self, link: WorkerLink, key: str, request: EngineRequest, now: float) -> None:
        """Record that a prompt was sent to a worker. The worker will soon hold the prompt's blocks."""
        if (prefix := self._prefixes.pop(key, None)) is not None:
            self._hot.record(prefix, now)
        block_size = link.info.block_size
        index = self._indexes.get((link.identity.model, block_size))
        if index is not None and len(request.prompt_token_ids) >= MIN_TOKENS:
            hashes = self._prompt_hashes(key, block_size, request)
            index.expect(link.identity.worker_id, hashes, now + EXPECTED_S)
            self._hashes.pop((key, block_size), None)

    def maintain(self, now: float) -> None:
        """Do a part of the pending maintenance of each model's cache index. Takes about a millisecond for an index with
        much pending work."""
        if "numpy" in sys.modules:
            for name, unapplied in self._unapplied.items():
                if unapplied.size >= BATCH_BYTES and name not in self._due:  # arrived before numpy was imported
                    self._apply_soon(name)
        for index in self._indexes.values():
            index.maintain(now, SEGMENTS)

    def _prompt_hashes(self, key: str, block_size: int, request: EngineRequest) -> Hashes:
        """Return the hashes of all whole blocks of a prompt. `key`: the sequence's key, under which the hashes are
        remembered.

        A block that ends with the last token is included: the worker will hold this block, although it cannot be
        reused for this prompt.
        """
        from cluster.policy.kv_cache.prefix_hashes import seed_of  # not at the start: deferred_imports.py
        from cluster.policy.kv_cache.prompt_hashes import PromptHashes

        known = self._hashes.get((key, block_size))
        if known is None:
            ids = request.prompt_token_ids
            whole = len(ids) // block_size * block_size
            if self._earlier is None:
                self._earlier = PromptHashes()
            known = self._earlier.hashes(ids[:whole], block_size, seed_of(request.cache_salt, request.adapter))
            self._hashes[key, block_size] = known
            while len(self._hashes) > MAX_PROMPTS:
                self._hashes.popitem(last=False)
        return known
