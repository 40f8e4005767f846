"""The workers that are linked to a gateway, as the scheduling policy sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from cluster.api.types import CompatibilityKey
from cluster.policy.routing.router import Candidate, RouteCall, RoutingDecision
from cluster.policy.scheduling.worker_waits import Need


class Workers(Protocol):
    """The linked workers of one gateway. A gateway and the simulators implement this protocol."""

    def route(self, call: RouteCall, now: float) -> RoutingDecision:
        """Pick a worker for a new sequence, by the rules in policy/routing/fleet.py. Returns the decision with its
        reasons."""

    def candidates(self, model: str, now: float, resumed: bool) -> Sequence[Candidate]:
        """Return all workers of a model. `resumed`: whether they are for a sequence that resumes. The result may be
        lazy: the state of a worker is then read when the caller accesses the worker."""

    def candidate(self, model: str, incarnation: str, now: float) -> Candidate | None:
        """Return one worker of a model for a sequence that resumes, or None if the worker is not linked."""

    def cached_tokens(self, model: str, key: str) -> Mapping[str, int] | None:
        """Return how many leading tokens of a new sequence's prompt each worker of a model holds in its KV cache, by
        worker id. Workers that hold none are left out. None if the numbers are not known or make no difference."""

    def held_tokens(self, model: str, key: str) -> Mapping[str, int]:
        """Return how many leading tokens of a prompt each worker of a model holds in its KV cache, by worker id. Unlike
        `cached_tokens`, this method also returns the numbers for a model with only one worker, and it never returns
        None."""

    def free_tokens(self, model: str, worker_id: str) -> int | None:
        """Return the number of tokens of the largest prompt that a worker can take now; 0 if it can take no sequence
        now, None if the worker is not linked or takes no new sequences."""

    def has_adapter(self, model: str, adapter: str) -> bool:
        """Return whether any worker of a model takes calls for an adapter. `adapter`: the adapter's name in the form of
        RouteCall.adapter. This check is cheap."""

    def has_version(self, model: str, need: Need) -> bool:
        """Return whether any worker of a model has a version, tokenizer and weights that `need` allows. The adapter and
        the worker's state do not matter. This check is cheap."""

    def runs_suspect(self, model: str, incarnation: str) -> bool:
        """Return whether a worker runs a suspect sequence (worker_losses.py) that has got no token from this worker
        yet."""

    def is_replaced(self, model: str, compatibility: CompatibilityKey | None) -> bool:
        """Return whether workers that cannot resume a sequence have replaced all workers that could. `compatibility`:
        the compatibility key of the sequence."""
