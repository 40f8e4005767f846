"""The demand for each model at one gateway, as the gateway reports it to the controller. demand.py keeps the counts."""

from __future__ import annotations

import time
from collections.abc import Sequence

from cluster.api.demand import ModelDemand
from cluster.gateway.scheduling.scheduler import Scheduler


class DemandReports:
    """Source of a gateway's demand reports for the controller. A report has the gateway's demand for each model."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def current(self) -> Sequence[ModelDemand]:
        """Return the current demand for each model."""
        queues, now = self._scheduler.queues, time.monotonic()
        return [
            ModelDemand(
                model.name,
                *self._waiting(model.name),
                sum(link.running for link in model.links.values()),
                queues.arrived[model.name],
                queues.arrived_tokens[model.name],
                queues.tally.classes(model.name, now, model.served),
            )
            for model in self._scheduler.host.directory.models
        ]

    def _waiting(self, model: str) -> tuple[int, int]:
        """Return the number of requests that wait for a model's workers, and the number of tokens to compute for
        them."""
        requests, tokens = self._scheduler.queues.waiting(model)
        chats, guessed = self._scheduler.renders.waiting(model)
        return requests + chats, tokens + guessed
