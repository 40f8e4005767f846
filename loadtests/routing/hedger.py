"""Interface of a hedging policy, which says which calls go to a second worker before their first token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

from cluster.policy.routing.router import Candidate, RouteCall, RoutingDecision

_MODULE = "cluster.policy.scheduling.hedging"


class Hedger(Protocol):
    """Hedging policy of one gateway. Times are in seconds, tokens those that a worker is expected to compute."""

    @property
    def next_due(self) -> float:
        """Time at which `late` is to be called next; infinity if no call is needed."""

    def sent(self, key: str, model: str, worker_id: str, uncached_tokens: int, now: float) -> None:
        """Record a call that was sent to its first worker."""

    def late(self, now: float) -> Iterable[str]:
        """Return the calls that are late now."""

    def may_hedge(self, key: str, waiting: int) -> bool:
        """Return whether a late call may be hedged. `waiting`: number of waiting calls."""

    def second_worker(self, call: RouteCall, candidates: Iterable[Candidate]) -> RoutingDecision:
        """Pick the second worker of a call."""

    def hedged(self, key: str, worker_id: str, uncached_tokens: int, now: float) -> None:
        """Record that a call was sent to a second worker."""

    def hedge_ended(self, key: str, won: bool, now: float) -> int:
        """Record that the first worker is out if the hedge has `won`, else the second one."""

    def answered(self, key: str, uncached_tokens: int, now: float) -> None:
        """Record the first token of a call."""


def production_hedger(share: float) -> Callable[[], Hedger] | None:
    """Return a function that creates the production policy, or None while there is none. `share`: largest share of the
    calls that are hedged."""
    if find_spec(_MODULE) is None:
        return None
    policy: Any = import_module(_MODULE)
    return lambda: policy.HedgingPolicy(share)
