"""What the routing policies see of this gateway's links and calls."""

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
    """What a sequence needs to go on. `cached_tokens` of its prompt are expected in any worker's cache.

    Where nobody is left but those that have failed it, they may try again: Ray may be about to replace one, and it is
    not certain whose fault it was. Workers on the node of one that was lost just now are avoided likewise: with a host
    all of its workers are lost, one after the other."""
    home = (
        next((one for one in candidates if one.incarnation == sequence.cached_on), None) if sequence.cached_on else None
    )
    call = RouteCall(
        sequence.call.model,
        sequence.tokens,
        compatibility_key=sequence.compatibility,
        excluded=sequence.excluded,
        uncached_tokens=max(sequence.tokens - cached_tokens, 1),
        cached_on=sequence.cached_on,
        uncached_there=known.links[home.worker_id].tokens_to_recompute(sequence.tokens) if home is not None else 0,
    )
    others = [one.incarnation for one in candidates if not one.draining and is_compatible(call, one)]
    for excluded in (call.excluded | _beside_lost(sequence, known, now), call.excluded):
        if any(incarnation not in excluded for incarnation in others):
            return replace(call, excluded=excluded)
    return replace(call, excluded=frozenset())


def _beside_lost(sequence: CallSequence, known: KnownModel, now: float) -> frozenset[str]:
    """Incarnations of the workers on the node where the sequence's worker was lost just now."""
    node = sequence.lost_node
    if not node or now - sequence.lost_at >= SETTLE_S:
        return frozenset()
    identities = (link.identity for link in known.links.values())
    return frozenset(one.incarnation for one in identities if one.node == node)


def candidate(link: WorkerLink, *, healthy: bool, resumed: bool, retired: bool) -> Candidate:
    """How a worker stands. `resumed`: for a sequence to be resumed."""
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
