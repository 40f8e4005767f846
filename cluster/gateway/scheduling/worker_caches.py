"""The KV blocks that workers hold, as far as this gateway knows: a cache index for each model.

Workers of one model may have blocks of different sizes. Each size has an index of its own, since prefix hashes depend
on it.
"""

from __future__ import annotations

import secrets
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from cluster.api.types import KV_EVENTS, EngineRequest
from cluster.gateway.links.worker_link import WorkerLink
from cluster.link.v1 import link_pb2 as pb
from cluster.policy.routing.hot_prefixes import HotPrefixes
from cluster.wire.codec import check_kv_blocks

if TYPE_CHECKING:
    from cluster.policy.kv_cache.index import CacheIndex
    from cluster.policy.kv_cache.prefix_hashes import Hashes

EXPECTED_S: Final = 10.0
"""Seconds for which a worker is expected to hold the blocks of a prompt that was sent to it, unless it reports them."""
MAX_BLOCKS: Final = 1 << 24
"""Maximum number of different blocks in an index."""
BATCH_BYTES: Final = 8 * 1024
"""Size of the reports of a worker from which they are applied. Small reports are applied together, since each change of
an index has a price of its own; a call that looks into the index applies them first."""
MAX_EARLY_BYTES: Final = 8 << 20
"""Greatest size of the reports of a worker that wait for the modules they need. A worker with more is forgotten."""
SEGMENTS: Final = 16
"""Number of segments of an index from which departed workers are removed at once."""
MIN_TOKENS: Final = 512
"""Number of prompt tokens from which a call is routed by its prefix. To compute less takes about as long as a look at
the index, and spreads better by load alone."""
MAX_PROMPTS: Final = 512
"""Number of prompts whose hashes are remembered while they wait."""

_IndexKey = tuple[str, int]


@dataclass(slots=True)
class _Unapplied:
    """Reports of a worker that are not in the index yet. `size`: bytes of their hashes."""

    link: WorkerLink
    messages: list[pb.KvBlocks] = field(default_factory=list)
    size: int = 0


class WorkerCaches:
    """The cache indexes of one gateway."""

    def __init__(self) -> None:
        self._indexes: dict[_IndexKey, CacheIndex] = {}
        self._unapplied: dict[str, _Unapplied] = {}
        self._hashes: OrderedDict[tuple[str, int], Hashes] = OrderedDict()
        self._prefixes: OrderedDict[str, int] = OrderedDict()
        """Hash of the longest cached prefix of waiting sequences, by the sequence's key."""
        self._hot = HotPrefixes()

    def report(self, link: WorkerLink, message: pb.KvBlocks) -> None:
        """Take a worker's report. Raises ValueError for a malformed report."""
        if KV_EVENTS not in link.info.capabilities:
            return
        size = check_kv_blocks(message)  # before it waits: an error must end this link, not a call
        unapplied = self._unapplied.get(link.name)
        if unapplied is None:
            unapplied = self._unapplied[link.name] = _Unapplied(link)
        unapplied.messages.append(message)
        unapplied.size += size
        if "numpy" in sys.modules:  # otherwise deferred_imports.py imports it soon, without blocking the event loop
            if unapplied.size >= BATCH_BYTES or message.is_reset:
                self._apply(unapplied)
        elif unapplied.size > MAX_EARLY_BYTES:
            unapplied.messages.clear()

    def _apply(self, unapplied: _Unapplied) -> None:
        """Apply the reports of a worker, those that undo each other not at all."""
        from cluster.policy.kv_cache.index import CacheIndex  # not at the start: deferred_imports.py
        from cluster.wire.kv_codec import joined_changes, kv_blocks_from_pb

        link = unapplied.link
        del self._unapplied[link.name]
        change, worker = joined_changes(map(kv_blocks_from_pb, unapplied.messages)), link.identity.worker_id
        key = (link.identity.model, link.info.block_size)
        index = self._indexes.get(key)
        if index is None:
            index = self._indexes[key] = CacheIndex(MAX_BLOCKS, secrets.randbits(64))
        if change.is_reset:
            index.add_worker(worker)
        index.remove(worker, change.removed)
        index.store(worker, change.stored)

    def _apply_all(self, model: str) -> None:
        if "numpy" in sys.modules:
            for unapplied in [each for each in self._unapplied.values() if each.link.identity.model == model]:
                self._apply(unapplied)

    def forget(self, link: WorkerLink) -> None:
        """Forget the blocks of a worker whose link has ended."""
        self._unapplied.pop(link.name, None)
        key = (link.identity.model, link.info.block_size)
        if (index := self._indexes.get(key)) is not None:
            index.remove_worker(link.identity.worker_id)
            if not index.workers:
                del self._indexes[key]

    def cached_tokens(self, model: str, key: str, request: EngineRequest) -> Mapping[str, int]:
        """Return how many leading tokens of a prompt each worker of a model holds; workers that hold none are left out.
        `key`: key of the sequence. At least the last token of a prompt is always computed."""
        out: dict[str, int] = {}
        if len(request.prompt_token_ids) < MIN_TOKENS:
            return out
        self._apply_all(model)
        for (name, block_size), index in self._indexes.items():
            if name == model:
                hashes = self._prompt_hashes(key, block_size, request)
                matched = index.match(hashes)
                for worker, blocks in matched.items():
                    out[worker] = blocks * block_size
                if matched:
                    self._prefixes[key] = int(hashes[max(matched.values()) - 1])
                    if len(self._prefixes) > MAX_PROMPTS:
                        self._prefixes.popitem(last=False)
        return out

    def sharing(self, key: str, now: float) -> float:
        """Return how many sequences were sent lately with the longest cached prefix of a waiting sequence."""
        prefix = self._prefixes.get(key)
        return 0.0 if prefix is None else self._hot.recent(prefix, now)

    def expect(self, link: WorkerLink, key: str, request: EngineRequest, now: float) -> None:
        """Record that a prompt was sent to a worker, which will soon hold its blocks."""
        if (prefix := self._prefixes.pop(key, None)) is not None:
            self._hot.record(prefix, now)
        block_size = link.info.block_size
        index = self._indexes.get((link.identity.model, block_size))
        if index is not None and len(request.prompt_token_ids) >= MIN_TOKENS:
            hashes = self._prompt_hashes(key, block_size, request)
            index.expect(link.identity.worker_id, hashes, now + EXPECTED_S)
            self._hashes.pop((key, block_size), None)

    def maintain(self, now: float) -> None:
        """Do a part of the indexes' maintenance, about a millisecond for each index with much to do."""
        for index in self._indexes.values():
            index.maintain(now, SEGMENTS)

    def _prompt_hashes(self, key: str, block_size: int, request: EngineRequest) -> Hashes:
        from cluster.policy.kv_cache.prefix_hashes import prefix_hashes, seed_of  # not at the start

        known = self._hashes.get((key, block_size))
        if known is None:
            ids = request.prompt_token_ids
            whole = (len(ids) - 1) // block_size * block_size
            known = prefix_hashes(ids[:whole], block_size, seed_of(request.cache_salt, request.adapter))
            self._hashes[key, block_size] = known
            while len(self._hashes) > MAX_PROMPTS:
                self._hashes.popitem(last=False)
        return known
