"""Policies that choose the worker of a new call, by name: the gateways' policy, variants of it, and plain policies.

A policy is a function of the call and the candidates, as `policy.routing.router.pick` is. Random choices come from a
seeded generator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from random import Random

from cluster.policy.routing.cost import CostWeights, RoutingSettings
from cluster.policy.routing.fleet import choose
from cluster.policy.routing.router import Candidate, RouteCall, RoutingDecision

Picker = Callable[[RouteCall, Sequence[Candidate]], RoutingDecision]
Prefix = Callable[[], int]
"""Function that returns the hash of the first blocks of the prompt, 0 for a short prompt."""
LEAST_LOADED, CACHED = "least_loaded", "cached_prefix"


def _fits(call: RouteCall, candidate: Candidate) -> bool:
    return candidate.free_sequences > 0 and candidate.free_tokens >= call.tokens


def _decided(worker: Candidate, call: RouteCall) -> RoutingDecision:
    return RoutingDecision(worker.worker_id, CACHED if call.cached.get(worker.worker_id) else LEAST_LOADED, ())


_NONE = RoutingDecision(None, "no_free_sequence", ())


def _chosen(choose: Callable[[RouteCall, list[Candidate]], Candidate]) -> Picker:
    """Return a policy that calls `choose` with the candidates that have capacity for the call."""

    def picker(call: RouteCall, candidates: Sequence[Candidate]) -> RoutingDecision:
        fitting = [candidate for candidate in candidates if _fits(call, candidate)]
        return _decided(choose(call, fitting), call) if fitting else _NONE

    return picker


def _load(candidate: Candidate) -> tuple[float, float, str]:
    """Sort key for the load: prompt tokens to compute, plus 2,000 for each running sequence. Of workers with equal
    load, the worker that has waited longest for a call comes first."""
    return candidate.prefill_tokens + 2000.0 * candidate.running, candidate.last_sent, candidate.worker_id


def _product(prefix: Prefix, rng: Random) -> Picker:
    """Return the production policy, which the gateways use."""
    return choose


def _impatient(prefix: Prefix, rng: Random) -> Picker:
    settings = RoutingSettings(weights=CostWeights(patience=0.0))
    return lambda call, candidates: choose(call, candidates, settings)


def _product_without_rates(prefix: Prefix, rng: Random) -> Picker:
    return lambda call, candidates: choose(call, [replace(candidate, slowdown=1.0) for candidate in candidates])


def _round_robin(prefix: Prefix, rng: Random) -> Picker:
    return _chosen(lambda call, fitting: min(fitting, key=lambda c: (c.last_sent, c.worker_id)))


def _least_load(prefix: Prefix, rng: Random) -> Picker:
    return _chosen(lambda call, fitting: min(fitting, key=_load))


def _power_of_two(prefix: Prefix, rng: Random) -> Picker:
    return _chosen(lambda call, fitting: min(rng.sample(fitting, min(len(fitting), 2)), key=_load))


def _consistent_hash(prefix: Prefix, rng: Random) -> Picker:
    """Return a policy that picks by rendezvous hashing of the first blocks. Prompts without a whole block go to the
    worker with the least load."""

    def choose(call: RouteCall, fitting: list[Candidate]) -> Candidate:
        first = prefix()
        if not first:
            return min(fitting, key=_load)
        return max(fitting, key=lambda c: blake2b(f"{first} {c.worker_id}".encode(), digest_size=8).digest())

    return _chosen(choose)


def _longest_prefix(prefix: Prefix, rng: Random) -> Picker:
    """Return the policy that picks the worker with the longest cached prefix. Among workers with equally long prefixes,
    it picks the one with the least load."""
    return _chosen(lambda call, fitting: min(fitting, key=lambda c: (-call.cached.get(c.worker_id, 0), _load(c))))


def _prefix_or_load(prefix: Prefix, rng: Random) -> Picker:
    """Return a policy like that of SGLang's router. It picks the worker with the longest cached prefix if that prefix
    is at least half of the prompt and the loads are balanced. Otherwise it picks the worker with the least load."""

    def choose(call: RouteCall, fitting: list[Candidate]) -> Candidate:
        longest = min(fitting, key=lambda c: (-call.cached.get(c.worker_id, 0), _load(c)))
        counts = [c.running for c in fitting]
        balanced = max(counts) - min(counts) <= 32 or max(counts) <= 1.5 * min(counts)
        is_long = 2 * call.cached.get(longest.worker_id, 0) >= call.tokens
        return longest if is_long and balanced else min(fitting, key=_load)

    return _chosen(choose)


POLICIES: Mapping[str, Callable[[Prefix, Random], Picker]] = {
    "cost": _product,
    "cost without rates": _product_without_rates,
    "impatient cost": _impatient,
    "round robin": _round_robin,
    "least load": _least_load,
    "power of two": _power_of_two,
    "consistent hash": _consistent_hash,
    "longest prefix": _longest_prefix,
    "prefix or load": _prefix_or_load,
}
OURS = "cost"
PLAIN = ("round robin", "least load", "power of two", "consistent hash", "longest prefix", "prefix or load")
"""Plain policies. The best of them is the baseline."""
BLIND = ("round robin", "least load", "power of two", "consistent hash")
"""Policies that do not use the cache index."""
