"""The routing request (RouteCall) for a sequence that resumes, and the workers that suit the sequence."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from cluster.policy.routing.router import Candidate, RouteCall, is_compatible, may_take_resumed, needs_parser
from cluster.policy.scheduling.instructions import ResumingSequence
from cluster.policy.scheduling.worker_losses import SETTLE_S


def resumed_request(sequence: ResumingSequence, candidates: Collection[Candidate], now: float) -> RouteCall:
    """Return the routing request for a sequence that resumes on one of these workers.

    Two groups of workers are excluded. First, the workers in `sequence.excluded`, which failed the sequence. Second,
    the workers on the node where the sequence lost a worker just now, since the workers of a lost host are lost one
    after the other. An exclusion that leaves no compatible worker is dropped, because the excluded workers may be
    healthy.
    """
    holder = None
    if sequence.cached_on:
        holder = next((worker for worker in candidates if worker.incarnation == sequence.cached_on), None)
    call = RouteCall(
        sequence.model,
        sequence.tokens,
        compatibility_key=sequence.compatibility,
        excluded=sequence.excluded,
        uncached_tokens=max(sequence.tokens - sequence.entry.cached_tokens, 1),
        cached_on=sequence.cached_on,
        uncached_there=0 if holder is None else tokens_to_recompute(sequence.tokens, holder.block_size),
        needs_tools=needs_parser(sequence.entry.needs_tools, candidates),
        adapter=sequence.entry.adapter,
    )
    compatible = [
        worker.incarnation
        for worker in candidates
        if not worker.draining and is_compatible(call, worker) and has_adapter(call.adapter, worker)
    ]
    for excluded in (call.excluded | _on_lost_node(sequence, candidates, now), call.excluded):
        if any(incarnation not in excluded for incarnation in compatible):
            return replace(call, excluded=excluded)
    return replace(call, excluded=frozenset())


def suits(sequence: ResumingSequence, worker: Candidate, now: float) -> bool:
    """Return whether a sequence may resume on a worker now. The worker must be healthy and not draining, have capacity,
    be compatible with the sequence, and not be excluded for it."""
    return (
        may_take_resumed(worker)
        and worker.healthy
        and not worker.draining
        and worker.incarnation not in sequence.excluded
        and (worker.parses_tools or not sequence.entry.needs_tools)
        and has_adapter(sequence.entry.adapter, worker)
        and not (worker.node == sequence.lost_node != "" and now - sequence.lost_at < SETTLE_S)
        and sequence.compatibility is not None
        and worker.compatibility_key is not None
        and worker.compatibility_key.can_resume(sequence.compatibility)
    )


def has_adapter(adapter: str, worker: Candidate) -> bool:
    """Return whether a worker takes calls for an adapter. The adapter "" is the base model; each worker takes it."""
    return not adapter or adapter in worker.adapters


def tokens_to_recompute(tokens: int, block_size: int) -> int:
    """Return how many tokens the engine must compute before the next token, if it holds the KV blocks of all `tokens`.

    The engine reuses only full blocks of `block_size` tokens, and never the block of the last token.
    """
    size = max(block_size, 1)
    return tokens - max(tokens - 1, 0) // size * size


def _on_lost_node(sequence: ResumingSequence, candidates: Collection[Candidate], now: float) -> frozenset[str]:
    """Return the incarnations of the workers on the node where the sequence lost a worker just now."""
    node = sequence.lost_node
    if not node or now - sequence.lost_at >= SETTLE_S:
        return frozenset()
    return frozenset(worker.incarnation for worker in candidates if worker.node == node)
