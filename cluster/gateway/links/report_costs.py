"""Costs of what workers send beside the outputs of their requests, and the rate at which a gateway reads it.

Problem: a worker may send valid reports without end, and each takes time of the event loop that all links share.

Method: what a message costs is estimated from its contents, in microseconds, and charged to the worker's model, which a
certificate proves. A model has RATE a second for itself. What exceeds this is charged to a pool that all models share.
If the pool is empty too, the gateway does not read the link for a while. Requests that the gateway has sent to a worker
pay for the messages about them, so a busy link is never slowed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from cluster.http2.limits import Bucket

MESSAGE: Final = 100.0
"""Cost of a message without an output of a request."""
USAGE: Final = 60.0
FLOW: Final = 4.0
ADAPTER: Final = 20.0
STRAY: Final = 1.0
"""Cost of an output for a slot that has no request."""
KV_BYTE: Final = 0.15
HELLO: Final = 3_000.0
FAULT: Final = 200_000.0
"""Cost of a message that cannot be applied, which ends its link."""
PER_REQUEST: Final = 1_500.0
"""Costs of reports that each request pays for."""
RATE: Final = 50_000.0
"""Costs per second that each model may cause, a twentieth of a core."""
POOL_RATE: Final = 200_000.0
"""Costs per second that all models together may cause beyond RATE."""
BURST_S: Final = 2.0
MAX_MODELS: Final = 4096
"""Maximum number of models with a bucket. The one that was used longest ago is forgotten first."""


class ReportCosts:
    """The buckets to which the costs of reports are charged."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pool = Bucket(POOL_RATE, POOL_RATE * BURST_S, clock())
        self._models: dict[str, Bucket] = {}

    def charge(self, model: str, cost: float) -> float:
        """Charge a cost to a model. Returns the seconds for which the link must not be read. `cost` is negative for
        requests that pay for later reports."""
        now = self._clock()
        bucket = self._models.pop(model, None) or Bucket(RATE, RATE * BURST_S, now)
        self._models[model] = bucket
        if len(self._models) > MAX_MODELS:
            del self._models[next(iter(self._models))]
        if (level := bucket.charge(cost, now)) >= 0:
            return 0.0
        bucket.charge(level, now)  # the pool pays what the model lacks
        return self._pool.delay_s() if self._pool.charge(-level, now) < 0 else 0.0

    async def spend(self, model: str, cost: float) -> None:
        """Charge a cost to a model, and wait as long as the link must not be read."""
        if delay_s := self.charge(model, cost):
            await asyncio.sleep(delay_s)
