"""Policies that choose the worker of a new call, by name: that of the gateways, a variant that waits, plain ones.

A policy is a function of the call and the candidates, like `policy.routing.router.pick`. It gets what it must not read
from a clock or a generator of its own from its `PickerView` and its seeded generator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from random import Random

from cluster.policy.routing.cost import CostWeights as ProductWeights
from cluster.policy.routing.cost import RoutingSettings
from cluster.policy.routing.fleet import choose
from cluster.policy.routing.router import Candidate, RouteCall, RoutingDecision

Picker = Callable[[RouteCall, Sequence[Candidate]], RoutingDecision]
LEAST_LOADED, CACHED, WAITS = "least_loaded", "cached_prefix", "waits_for_cache"


@dataclass(frozen=True, slots=True)
class PickerView:
    """What a policy may read of its gateway. `slowness(worker id)`: how many times slower than the median the worker
    computes prompts. `prefix()`: hash of the first blocks of the prompt, 0 for a short prompt. `foreign(worker id)`:
    number of calls of other gateways in the worker's queue, as of its last report."""

    slowness: Callable[[str], float]
    prefix: Callable[[], int]
    foreign: Callable[[str], int]


@dataclass(frozen=True, slots=True)
class CostWeights:
    """Weights of a cost like that of the gateways, with patience, in prompt tokens to compute:

        cost = slowness * (waiting + computed * uncached + load + memory * kv_usage ** 2)
        waiting = waiting_prefill + queued * foreign
        load = full * ((running + 1) / slots) ** power

    `queued`: tokens for a call of another gateway in the worker's queue. `computed`: price of a token that the worker
    must compute. It is above 1, since others wait for it too, and since another copy of a prefix evicts blocks that
    would have been found later. `slots`: slots of a worker; 0: as many as run and may be sent now. `is_rated`: whether
    the slowness is used, else 1. `patience`: a call waits for the worker of the least cost, if that one has no free
    credit, when its first token comes sooner there than at the best other worker, or, where a part of its prompt is
    cached, within this number of prompt tokens. 0: it never waits.
    """

    queued: float = 2_048.0
    computed: float = 8.0
    full: float = 256_000.0
    power: float = 1.0
    memory: float = 8_000.0
    slots: int = 64
    is_rated: bool = True
    patience: float = 6_000.0

    def own_wait(self, call: RouteCall, candidate: Candidate, foreign: int) -> float:
        """Return the number of prompt tokens that are computed at a candidate before the call's first token."""
        waiting = candidate.prefill_tokens + self.queued * foreign
        return waiting + call.tokens - call.cached.get(candidate.worker_id, 0)

    def cost(self, call: RouteCall, candidate: Candidate, slowness: float, foreign: int) -> float:
        """Return the cost of a candidate."""
        uncached = call.tokens - call.cached.get(candidate.worker_id, 0)
        slots = self.slots or candidate.running + candidate.free_sequences
        load = self.full * float(((candidate.running + 1) / slots) ** self.power) + self.memory * candidate.kv_usage**2
        waiting = candidate.prefill_tokens + self.queued * foreign
        return (slowness if self.is_rated else 1.0) * (waiting + self.computed * uncached + load)


def _fits(call: RouteCall, candidate: Candidate) -> bool:
    return candidate.free_sequences > 0 and candidate.free_tokens >= call.tokens


def _decided(worker: Candidate, call: RouteCall) -> RoutingDecision:
    return RoutingDecision(worker.worker_id, CACHED if call.cached.get(worker.worker_id) else LEAST_LOADED, ())


_NONE = RoutingDecision(None, "no_free_sequence", ())


def _chosen(choose: Callable[[RouteCall, list[Candidate]], Candidate]) -> Picker:
    """Return a policy that applies a choice to the candidates with free capacity."""

    def picker(call: RouteCall, candidates: Sequence[Candidate]) -> RoutingDecision:
        fitting = [candidate for candidate in candidates if _fits(call, candidate)]
        return _decided(choose(call, fitting), call) if fitting else _NONE

    return picker


def cost(weights: CostWeights) -> Callable[[PickerView, Random], Picker]:
    """Return the policy of the least cost."""

    def build(view: PickerView, _: Random) -> Picker:
        def slowness(at: Candidate) -> float:
            return view.slowness(at.worker_id) if weights.is_rated else 1.0

        def own_wait(call: RouteCall, at: Candidate) -> float:
            return slowness(at) * weights.own_wait(call, at, view.foreign(at.worker_id))

        def order(call: RouteCall, at: Candidate) -> tuple[float, float, str]:
            value = weights.cost(call, at, slowness(at), view.foreign(at.worker_id))
            return value, at.last_sent, at.worker_id

        def picker(call: RouteCall, candidates: Sequence[Candidate]) -> RoutingDecision:
            fitting = [candidate for candidate in candidates if _fits(call, candidate)]
            if not fitting:
                return _NONE
            best = min(fitting, key=lambda at: order(call, at))
            if weights.patience and len(fitting) < len(candidates):
                least = min(candidates, key=lambda at: order(call, at))
                here, there = (own_wait(call, at) for at in (best, least))
                limit = weights.patience if least.worker_id in call.cached else 0.0
                if least is not best and there < max(here, limit):
                    return RoutingDecision(None, WAITS, ())
            return _decided(best, call)

        return picker

    return build


def _load(candidate: Candidate) -> tuple[float, float, str]:
    """Order of least load: waiting prompt tokens, with 2,000 for each running sequence."""
    return candidate.prefill_tokens + 2000.0 * candidate.running, candidate.last_sent, candidate.worker_id


def _product(view: PickerView, rng: Random) -> Picker:
    """Return the policy of the gateways."""
    return choose


def _impatient(view: PickerView, rng: Random) -> Picker:
    settings = RoutingSettings(weights=ProductWeights(patience=0.0))
    return lambda call, candidates: choose(call, candidates, settings)


def _product_without_rates(view: PickerView, rng: Random) -> Picker:
    return lambda call, candidates: choose(call, [replace(candidate, slowdown=1.0) for candidate in candidates])


def _round_robin(view: PickerView, rng: Random) -> Picker:
    return _chosen(lambda call, fitting: min(fitting, key=lambda c: (c.last_sent, c.worker_id)))


def _least_load(view: PickerView, rng: Random) -> Picker:
    return _chosen(lambda call, fitting: min(fitting, key=_load))


def _power_of_two(view: PickerView, rng: Random) -> Picker:
    return _chosen(lambda call, fitting: min(rng.sample(fitting, min(len(fitting), 2)), key=_load))


def _consistent_hash(view: PickerView, rng: Random) -> Picker:
    """Return rendezvous hashing of the first blocks. Prompts without a whole block go to the least load."""

    def choose(call: RouteCall, fitting: list[Candidate]) -> Candidate:
        prefix = view.prefix()
        if not prefix:
            return min(fitting, key=_load)
        return max(fitting, key=lambda c: blake2b(f"{prefix} {c.worker_id}".encode(), digest_size=8).digest())

    return _chosen(choose)


def _longest_prefix(view: PickerView, rng: Random) -> Picker:
    """Return the precise policy without a load term: the longest cached prefix, of equal ones the least load."""
    return _chosen(lambda call, fitting: min(fitting, key=lambda c: (-call.cached.get(c.worker_id, 0), _load(c))))


def _prefix_or_load(view: PickerView, rng: Random) -> Picker:
    """Return a precise policy with a threshold, as in SGLang's router: the longest prefix if it is at least half of the
    prompt and loads are balanced, else the least load."""

    def choose(call: RouteCall, fitting: list[Candidate]) -> Candidate:
        longest = min(fitting, key=lambda c: (-call.cached.get(c.worker_id, 0), _load(c)))
        counts = [c.running for c in fitting]
        balanced = max(counts) - min(counts) <= 32 or max(counts) <= 1.5 * min(counts)
        is_long = 2 * call.cached.get(longest.worker_id, 0) >= call.tokens
        return longest if is_long and balanced else min(fitting, key=_load)

    return _chosen(choose)


POLICIES: Mapping[str, Callable[[PickerView, Random], Picker]] = {
    "cost": _product,
    "cost without rates": _product_without_rates,
    "blocking cost": cost(CostWeights()),
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
"""Policies of which the best is the baseline."""
BLIND = ("round robin", "least load", "power of two", "consistent hash")
"""Policies that do not use the cache index."""
