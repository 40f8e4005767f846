"""The gateways to which a worker connects, if there are many.

Problem. A link costs both sides CPU even while nothing runs, so with many workers and many gateways each worker
connects to some gateways only. Every gateway still needs workers of each model.

Invariants. Each worker chooses by itself, from the names of the gateways alone. All gateways get about the same number
of workers. If a gateway comes or goes and the number of links of each worker stays the same, at most one link of a
worker changes. A gateway gets LEAST_WORKERS workers of a model on average, or all workers of a model that has fewer.

Source: rendezvous hashing, see rendezvous.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cluster.policy.routing.rendezvous import hash64, preference

ALL_UP_TO: Final = 8
"""Default of `most`. With at most this number of gateways, each worker connects to all of them."""
LEAST_WORKERS: Final = 16
"""Number of a model's workers that a gateway gets on average. The probability that it gets none is then e**-16."""


@dataclass(frozen=True, slots=True)
class GatewaySubset:
    """The rule by which one worker chooses its gateways. `most`: usual number of gateways to which a worker connects.
    `replicas`: the worker's model has at least this many workers. If this number is small, each worker connects to more
    than `most` gateways."""

    worker_id: str
    most: int = ALL_UP_TO
    replicas: int = 1

    def links(self, gateways: int) -> int:
        """Return the number of gateways to connect to if there are `gateways` in all."""
        return min(gateways, max(self.most, -(-gateways * LEAST_WORKERS // max(self.replicas, 1))))

    def of(self, gateways: Sequence[str]) -> tuple[str, ...]:
        """Return the gateways to which the worker connects, in the order of `gateways`. `gateways`: distinct names of
        all gateways."""
        count = self.links(len(gateways))
        if count == len(gateways):
            return tuple(gateways)
        chosen = set(sorted(gateways, key=self._preference, reverse=True)[:count])
        return tuple(gateway for gateway in gateways if gateway in chosen)

    def _preference(self, gateway: str) -> float:
        return preference(hash64(self.worker_id), hash64(gateway))
