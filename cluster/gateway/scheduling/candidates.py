"""Conversion of links into candidates for the router, and of resumed sequences into routing requests."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from cluster.gateway.calls.call import CallSequence
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.models import KnownModel
from cluster.gateway.scheduling.worker_losses import SETTLE_S
from cluster.policy.routing.router import Candidate, RouteCall, is_compatible


def resumed_request(
    sequence: CallSequence, candidates: Collection[Candidate], known: KnownModel, cached_tokens: int, now: float
) -> RouteCall:
    """Return the routing request for a resumed sequence. `cached_tokens`: number of prompt tokens that are expected in
    the cache of any worker.

    Two groups of workers are excluded: the workers that failed the sequence, and the workers on the node of a worker
    that was lost just now. The second group is excluded because a lost host loses all its workers, one after the other.
    An exclusion that leaves no compatible worker is dropped: Ray may be about to replace the excluded worker, and it is
    not certain that the worker was at fault."""
    holder = (
        next((worker for worker in candidates if worker.incarnation == sequence.cached_on), None)
        if sequence.cached_on
        else None
    )
    call = RouteCall(
        sequence.call.model,
        sequence.tokens,
        compatibility_key=sequence.compatibility,
        excluded=sequence.excluded,
        uncached_tokens=max(sequence.tokens - cached_tokens, 1),
        cached_on=sequence.cached_on,
        uncached_there=known.links[holder.worker_id].tokens_to_recompute(sequence.tokens) if holder is not None else 0,
    )
    compatible = [worker.incarnation for worker in candidates if not worker.draining and is_compatible(call, worker)]
    for excluded in (call.excluded | _on_lost_node(sequence, known, now), call.excluded):
        if any(incarnation not in excluded for incarnation in compatible):
            return replace(call, excluded=excluded)
    return replace(call, excluded=frozenset())


def _on_lost_node(sequence: CallSequence, known: KnownModel, now: float) -> frozenset[str]:
    """Return the incarnations of all workers on the node where the sequence lost a worker just now."""
    node = sequence.lost_node
    if not node or now - sequence.lost_at >= SETTLE_S:
        return frozenset()
    identities = (link.identity for link in known.links.values())
    return frozenset(identity.incarnation for identity in identities if identity.node == node)


def candidate(link: WorkerLink, *, healthy: bool, resumed: bool, retired: bool) -> Candidate:
    """Return a worker as a candidate for the router. `resumed`: whether a sequence is to be resumed."""
    free = link.free
    return Candidate(
        worker_id=link.identity.worker_id,
        model=link.identity.model,
        version=link.identity.version,
        free_sequences=free.sequences,
        free_tokens=free.tokens,
        running=link.running,
        waiting=link.load.waiting,
        kv_usage=link.load.kv_usage,
        healthy=healthy,
        draining=not link.takes_new_requests,
        incarnation=link.identity.incarnation,
        compatibility_key=link.compatibility_key,
        resumed_prefill=link.pacing.resumed_tokens,
        new_prefill=link.pacing.new_tokens,
        prefill_budget=link.pacing.budget() if resumed or link.pacing.resumed_tokens else 0,
        prefill_tokens=link.prefill_tokens,
        retired=retired,
    )
