"""A gateway's predictions of cached tokens, compared with the numbers that the engines found in their caches. For
comparison, there is also a model of one cache as large as all caches together."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.api.types import EngineRequest
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.scheduling.worker_caches import WorkerCaches
from cluster.link.v1 import link_pb2 as pb
from cluster.policy.kv_cache.prefix_hashes import prefix_hashes, seed_of
from cluster.wire.codecs.kv_codec import kv_blocks_from_pb

BLOCK = 32
"""Tokens of a KV block of the engines."""


class PooledLru:
    """A prefix cache as large as the prefix caches of all engines together. It evicts the block that was used longest
    ago."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._held: OrderedDict[int, None] = OrderedDict()

    def hit(self, hashes: Sequence[int], whole: int) -> int:
        """Store all blocks of a prompt. Returns how many leading blocks, at most `whole`, were in the cache before."""
        count = 0
        while count < whole and hashes[count] in self._held:
            count += 1
        for value in reversed(hashes):  # the end of a prompt is evicted first
            self._held[value] = None
            self._held.move_to_end(value)
        while len(self._held) > self._blocks:
            self._held.popitem(last=False)
        return count


@dataclass(frozen=True, slots=True)
class Decision:
    """A call that was sent to a worker. `predicted`: tokens that the gateway believed cached on the worker."""

    at: float
    worker: str
    predicted: int
    hashes: Sequence[int]
    tokens: int


@dataclass(slots=True)
class Journal:
    """A record of a gateway's routing decisions and of its workers' reports of blocks."""

    caches: WorkerCaches
    decisions: dict[int, Decision] = field(default_factory=dict)
    """Decisions by the call's seed, which numbers the call and has no effect at temperature 0."""
    reports: list[tuple[float, str, frozenset[int], frozenset[int]]] = field(default_factory=list)
    """Time, worker, stored and removed blocks."""

    def install(self) -> None:
        """Wrap the methods of `caches`, so that the journal records the gateway's calls."""
        expect, report = self.caches.expect, self.caches.report

        def observed_expect(link: WorkerLink, key: str, request: EngineRequest, now: float) -> None:
            self._decided(link, key, request)
            expect(link, key, request, now)

        def observed_report(link: WorkerLink, message: pb.KvBlocks) -> None:
            change = kv_blocks_from_pb(message)
            stored, removed = frozenset(change.stored.tolist()), frozenset(change.removed.tolist())
            self.reports.append((time.monotonic(), link.identity.worker_id, stored, removed))
            report(link, message)

        self.caches.expect = observed_expect  # type: ignore[method-assign]
        self.caches.report = observed_report  # type: ignore[method-assign]

    def _decided(self, link: WorkerLink, key: str, request: EngineRequest) -> None:
        worker, ids = link.identity.worker_id, request.prompt_token_ids
        predicted = self.caches.cached_tokens(link.identity.model, key, request) or {}
        hashes = prefix_hashes(ids, BLOCK, seed_of(request.cache_salt, request.adapter)).tolist()
        decision = Decision(time.monotonic(), worker, predicted.get(worker, 0), hashes, len(ids))
        self.decisions[request.sampling.seed or 0] = decision

    def is_traced(self, decision: Decision, cached: int) -> bool:
        """Return whether a report of the worker explains why the predicted number of cached tokens was wrong.

        The report came after the decision and is about the first block at which the prediction differs from the engine.
        If the prediction was too high, the report says that this block was removed. If the prediction was too low, the
        report says that this block was stored.

        `cached`: number of cached tokens that the engine found.
        """
        at = min(decision.predicted, cached) // BLOCK
        block, is_lost = decision.hashes[at], decision.predicted > cached
        return any(
            block in (removed if is_lost else stored)
            for when, worker, stored, removed in self.reports
            if worker == decision.worker and when > decision.at
        )


@dataclass(slots=True)
class Compared:
    """Counts of calls whose prediction was compared with the engine's count. Short prompts are left out, because the
    gateway makes no prediction for them."""

    calls: int = 0
    equal: int = 0
    traced: int = 0
    evictions: int = 0
