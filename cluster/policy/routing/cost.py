"""The predicted cost of a new call at each worker. The unit is the time in which a usual worker computes one prompt
token. The worker with the lowest cost gets the call.

Problem: a call may go to the worker that holds most of its prompt, or to the worker with the least load. Both save
time, so both must be expressed in one unit. A sum of scores in [0, 1] has no such unit: its trade-off between tokens
and load changes with every scale.

Derivation. Each term is the time that this call or other calls wait because the call goes to this worker, divided by
the time that a usual worker needs for a prompt token:

    cost = slowdown * (waiting + computed * uncached + full * (running + 1) / slots + queued * queue
                       + memory * kv_usage^2 + adapter)  -  affinity

- `waiting`: prompt tokens of this gateway's sequences at the worker that have no output yet. The call waits for them.
- `uncached`: prompt tokens of the call that the worker must compute. The call waits while they are computed. The
  running sequences wait too, since they share the engine's steps, and so do the prompts after this one. `computed` is
  the number of prompts and sequences that wait in this way, including the call itself. Tokens that another worker
  holds count only in part, because computing them here also serves the recent calls with the same prefix, see
  hot_prefixes.py.
- `running / slots`: decoding. Each further sequence makes the engine's steps longer and delays all running sequences,
  so its cost is proportional to their number. `full` is the cost of a worker without a free slot. `slots` are the slots
  of the engine. The credit (capacity granted to this gateway) does not measure the load, since the engine's admission
  of prompts keeps it small.
  Among the workers of one model, an engine with more slots is faster, so a sequence costs less there. But few slots do
  not make an engine slow: usually its memory is small. So if no worker of a model has MIN_SLOTS slots, `full` is
  reduced (`settings_for`).
- `queue`: sequences of other gateways in the engine's queue. Their prompts are not known here, so each counts `queued`
  tokens. A sequence of this gateway without output is already part of `waiting`.
- `kv_usage`: the fuller the KV memory, the sooner sequences are preempted and cached blocks are evicted, and their
  tokens computed again. `memory` is the cost of a full memory.
- `adapter`: the call needs an adapter that lies in no slot of the engine. Before the call's first step the adapter is
  copied into a slot, where another adapter is dropped, and the steps of all sequences wait for the copy.
- `slowdown`: the time for a prompt relative to a usual worker of the model, see prefill_times.py.
- `affinity`: advantage of the worker that the call's affinity key prefers.

With equal workers and `queue`, `kv_usage` and `affinity` left out, this is the model of join-the-shortest-queue with
setup costs: the work that is ahead, plus the work that the call adds to others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

from cluster.policy.routing.router import Candidate

MIN_SLOTS: Final = 64
"""Number of slots below which `full` is reduced. If the largest worker of a model has fewer slots, `full` is multiplied
by that worker's slots / MIN_SLOTS. Otherwise, with 8 slots, one running sequence would cost as much as computing a
prompt of 1,000 tokens, and calls would leave the workers that hold their prompts."""

PolicyName = Literal["cost", "least_load", "round_robin", "power_of_two", "consistent_hash"]


@dataclass(frozen=True, slots=True)
class CostWeights:
    """Weights of the terms in the cost of a worker, which the module's docstring derives. All weights are at least 0.
    `computed` is a factor; the other weights are costs, counted in prompt tokens."""

    computed: float = 16.0
    """Cost of a prompt token that must be computed."""
    full: float = 128_000.0
    """Cost of a worker whose slots are all in use, if the model has workers with at least MIN_SLOTS slots."""
    queued: float = 2_048.0
    """Cost of a sequence of another gateway in the engine's queue."""
    memory: float = 8_000.0
    """Cost of a worker whose KV memory is full."""
    patience: float = 128_000.0
    """Longest predicted time to the first token, in prompt tokens, at which a call may wait for a full worker that
    holds the call's prompt, even if another worker would be faster. See policy/scheduling/set_aside.py."""
    adapter: float = 2_000.0
    """Cost of copying an adapter into a slot of the engine."""
    affinity: float = 32_000.0
    """Advantage of the preferred worker of a call's affinity key."""


@dataclass(frozen=True, slots=True)
class RoutingSettings:
    """The settings of the router for new calls.

    `policy` decides which worker gets a call. The policy `cost` picks the worker with the lowest cost. The
    other policies are simpler; they are for comparison and serve as fallbacks. `least_load`: the worker with
    the smallest share of used slots. `round_robin`: the worker to which this gateway has sent nothing for the
    longest time. `power_of_two`: the less loaded of two workers that are drawn by the call's id (Mitzenmacher
    2001). `consistent_hash`: the worker with the highest rendezvous hash of the affinity key, or of the
    beginning of the prompt if there is no key (Thaler and Ravishankar 1998).
    """

    policy: PolicyName = "cost"
    weights: CostWeights = CostWeights()


def settings_for(settings: RoutingSettings, largest: int) -> RoutingSettings:
    """Return the routing settings adapted to a model. `largest`: number of slots of the model's largest worker.

    If `largest` is below MIN_SLOTS, the cost weight `full` is reduced in proportion. On a small worker each sequence
    fills a larger share of the slots; with the reduced weight, a sequence costs no more than on a worker with MIN_SLOTS
    slots.
    """
    if largest >= MIN_SLOTS:
        return settings
    weights = settings.weights
    return replace(settings, weights=replace(weights, full=weights.full * largest / MIN_SLOTS))


def _load_share(c: Candidate) -> float:
    """Share of the worker's slots that are in use if it gets the call."""
    return (c.running + 1) / _slots(c)


def _slots(c: Candidate) -> int:
    return max(c.slots or c.free_sequences + c.running, 1)


def _foreign_queue(c: Candidate) -> int:
    """Number of sequences of other gateways in the engine's queue."""
    return max(c.waiting - c.unanswered, 0)


def standing_parts(settings: RoutingSettings, c: Candidate) -> tuple[tuple[str, float], ...]:
    """Return the parts of a worker's cost that are equal for all calls, as pairs of name and value."""
    weights, share = settings.weights, _load_share(c)
    match settings.policy:
        case "cost":
            kv_usage = min(max(c.kv_usage, 0.0), 1.0)
            return (
                ("waiting_prefill", c.slowdown * c.prefill_tokens),
                ("load", c.slowdown * weights.full * share),
                ("queue", c.slowdown * weights.queued * _foreign_queue(c)),
                ("memory", c.slowdown * weights.memory * kv_usage * kv_usage),
            )
        case "least_load" | "power_of_two":
            return (("load", share), ("queue", float(_foreign_queue(c))))
        case "round_robin":
            return (("last_sent", c.last_sent),)
        case "consistent_hash":
            return ()


def own_wait(settings: RoutingSettings, c: Candidate, uncached: float) -> float:
    """Return the predicted time to the first token of a call at a worker, in units of the time that a usual worker
    takes for one prompt token. `uncached`: number of tokens of the call that the worker must compute."""
    return c.slowdown * (c.prefill_tokens + settings.weights.queued * _foreign_queue(c) + uncached)


def sequence_cost(settings: RoutingSettings, c: Candidate) -> float:
    """Return how much each further sequence adds to the cost of a worker."""
    return c.slowdown * settings.weights.full / _slots(c)


def standing_cost(settings: RoutingSettings, c: Candidate) -> float:
    """Return the part of a worker's cost that is equal for all calls: the sum of the values of `standing_parts`."""
    total = 0.0
    for _, value in standing_parts(settings, c):
        total += value
    return total


def cost_per_token(settings: RoutingSettings, c: Candidate) -> float:
    """Return the cost of one prompt token that the worker must compute."""
    return c.slowdown * settings.weights.computed if settings.policy == "cost" else 0.0
