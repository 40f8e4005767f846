"""The `routing` section of cluster.yaml: which worker gets a new call."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cluster.config.section import Section
from cluster.policy.routing.cost import CostWeights, PolicyName, RoutingSettings

Tokens = Annotated[float, Field(ge=0, le=1e9)]
DEFAULT = CostWeights()


class RoutingWeights(Section):
    """Weights of the policy `cost`, which estimates what a call costs at each worker. The unit of a cost is the work of
    a usual worker for one prompt token."""

    computed_tokens: Annotated[float, Field(ge=1, le=1e6)] = DEFAULT.computed
    """Cost of each prompt token that the worker must compute: 1 for the wait of the call itself, and more for the
    waits of others. Higher: calls follow cached prefixes, lower: calls follow load."""
    full_worker_tokens: Tokens = DEFAULT.full
    """Cost of a worker whose slots are all in use, in proportion to the used share. Lower in proportion for a model
    whose workers all have fewer than 64 slots."""
    queued_request_tokens: Tokens = DEFAULT.queued
    """Cost of each request of another gateway that waits in the worker's engine."""
    full_memory_tokens: Tokens = DEFAULT.memory
    """Cost of a worker whose KV memory is full. It grows with the square of the used share."""
    patience_tokens: Tokens = DEFAULT.patience
    """A call waits for a worker without room that costs less and holds its prompt, if no more prompt tokens than this
    are computed there before its first token, or no more than at the best worker with room; at most five seconds. 0: no
    call waits."""
    adapter_tokens: Tokens = DEFAULT.adapter
    """Cost of a worker where the call's adapter lies in no slot of the engine, so that it is copied into one first."""
    affinity_tokens: Tokens = DEFAULT.affinity
    """Advantage of the worker that a call's `affinity_key` prefers. 0: keys have no effect."""


class Hedging(Section):
    """Second workers for calls whose first token is late. The first worker to answer keeps the call."""

    share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Part of a model's calls that may be sent to a second worker; 0: none."""


class Routing(Section):
    """Choice of the worker that gets a new call."""

    policy: PolicyName = "cost"
    """`cost`: the worker where the call and all others wait least, by cached prefixes, load and learned speed. The
    other policies are simple: `least_load`, `round_robin`, `power_of_two` (the less loaded of two random workers), and
    `consistent_hash` (by `affinity_key`, or else by the first 256 tokens of the prompt)."""
    weights: RoutingWeights = RoutingWeights()
    hedging: Hedging = Hedging()

    def settings(self) -> RoutingSettings:
        """Return the section as the routing policy's settings."""
        weights = self.weights
        return RoutingSettings(
            self.policy,
            CostWeights(
                computed=weights.computed_tokens,
                full=weights.full_worker_tokens,
                queued=weights.queued_request_tokens,
                memory=weights.full_memory_tokens,
                patience=weights.patience_tokens,
                affinity=weights.affinity_tokens,
                adapter=weights.adapter_tokens,
            ),
        )
