"""Statistics of the service that a gateway gives to each model's tenants. They are computed every second from the
models' fair orders (fair_queue.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.policy.fairness.fair_queue import FairOrder

SPEED_DECAY = 0.98
"""Factor by which a model's best speed decays in each second in which the model is slower."""


@dataclass(slots=True)
class _Speed:
    """Best recent speed of one model. `per_s`: weighted tokens per second that this gateway sent to workers while calls
    waited for the model."""

    charged: float = 0.0
    waited: bool = False
    per_s: float = 0.0


class ServiceStatistics:
    """Statistics of one gateway, by model: the model's speed, which is the highest recent rate at which weighted tokens
    were sent to workers, and the largest difference between the service of two tenants."""

    def __init__(self, order_of: Callable[[str], FairOrder]) -> None:
        """`order_of` returns the fair order of a model."""
        self._order_of = order_of
        self._speeds: dict[str, _Speed] = {}
        self.spreads: dict[str, float] = {}
        """Largest difference between the service accounts of two backlogged tenants, by model."""

    def update(self, models: Mapping[str, bool]) -> None:
        """Update the statistics of `models`, and forget all other models. Called once a second. `models`: for each
        model's name, whether a worker of the model is linked."""
        self._speeds = {model: speed for model, speed in self._speeds.items() if model in models}
        self.spreads = {}
        for model, served in models.items():
            statistics = self._order_of(model).statistics()
            self.spreads[model] = statistics.spread
            speed = self._speeds.setdefault(model, _Speed())
            if speed.waited and statistics.waiting and served:
                speed.per_s = max(statistics.charged - speed.charged, speed.per_s * SPEED_DECAY)
            speed.charged, speed.waited = statistics.charged, statistics.waiting > 0

    def starts_in_s(self, model: str, tenant: str, rank: int) -> float:
        """Return a lower bound on the wait of a tenant's new call, in seconds; 0 if no speed is known. `rank`: rank of
        the call's priority class.

        The bound is the service that certainly comes before the call, divided by the model's best recent speed.
        """
        speed = self._speeds.get(model)
        if speed is None or speed.per_s <= 0:
            return 0.0
        return self._order_of(model).backlogs.service_ahead(tenant, rank) / speed.per_s
