"""Rows for decisions about new calls. A row has the values of one worker that such a decision needs. The row is
computed again when its worker has changed."""

from __future__ import annotations

from typing import NamedTuple

from cluster.policy.routing.cost import RoutingSettings, cost_per_token, standing_cost
from cluster.policy.routing.rendezvous import hash64, mix64, preference
from cluster.policy.routing.router import Candidate, RouteCall


class Row(NamedTuple):
    """The values of a worker that routing decisions use.

    `is_open`: whether the worker passes the filters that are the same for all calls. `is_serving`: the same,
    but without the filter for a free slot. `max_tokens`: number of tokens of the largest prompt that fits.
    `standing`: the part of the worker's cost that is equal for all calls. `per_token`: the cost of each
    prompt token. `hashed`: hash of the worker's id. `shared_slots`: the worker's free slots, if they count
    towards the slots that must stay free (RouteCall.reserved_slots).
    """

    candidate: Candidate
    worker_id: str
    is_open: bool
    is_serving: bool
    max_tokens: float
    standing: float
    per_token: float
    hashed: int
    shared_slots: int


def row_of(candidate: Candidate, settings: RoutingSettings, hashed: int | None = None) -> Row:
    """Return the row of a worker. `hashed`: hash of its id, if known."""
    c = candidate
    stays = not c.draining and not c.retired
    return Row(
        c,
        c.worker_id,
        c.healthy and stays and c.free_sequences > 0,
        c.healthy and stays,
        min(c.free_tokens, c.prefill_budget - c.resumed_prefill - c.new_prefill)
        if c.resumed_prefill
        else c.free_tokens,
        standing_cost(settings, c),
        cost_per_token(settings, c),
        hash64(c.worker_id) if hashed is None else hashed,
        c.free_sequences if stays else 0,
    )


def cost_of(call: RouteCall, row: Row, settings: RoutingSettings) -> float:
    """Return the cost of a worker for a call. The advantage of affinity is not subtracted."""
    if settings.policy == "consistent_hash":
        return -preference(call.affinity or call.prefix, row.hashed)
    cost = row.per_token * uncached_of(call, call.cached.get(row.worker_id, 0)) + row.standing
    return cost + switch_of(call, row, settings) if call.adapter else cost


def switch_of(call: RouteCall, row: Row, settings: RoutingSettings) -> float:
    """Return the cost of copying the call's adapter into a slot of the worker's engine; 0 if it is already in a
    slot."""
    if not call.adapter or settings.policy != "cost" or call.adapter in row.candidate.resident:
        return 0.0
    return settings.weights.adapter * row.candidate.slowdown


def uncached_of(call: RouteCall, cached: float) -> float:
    """Return how many tokens of a call count as uncached at a worker that holds `cached` of its tokens.

    Tokens that only other workers hold count only in part: their number is divided by 1 + `call.sharing`. Recent calls
    with the same prefix need these tokens too, so each call counts its share.
    """
    uncached = call.tokens - min(cached, call.tokens)
    if not call.sharing or not call.cached:
        return uncached
    own = call.tokens - min(max(call.cached.values()), call.tokens)
    return own + (uncached - own) / (1.0 + call.sharing)


def two_of(call_id: str, count: int) -> tuple[int, int]:
    """Return two different numbers in [0, count), derived from a hash of the call's id. `count` is at least 2."""
    chance = hash64(call_id)
    first = chance % count
    return first, (first + 1 + mix64(chance) % (count - 1)) % count
