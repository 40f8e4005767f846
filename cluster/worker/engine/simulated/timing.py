"""Measurement of how long the requests of the simulated engine wait and compute.

As in a real engine, only sampled calls are timed.
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.api.request_times import RequestTimes
from cluster.api.types import EngineRequest, TokenOutput
from cluster.observe.trace_context import is_sampled


class SimTiming:
    """The times at which requests were submitted and first scheduled, for calls that are traced.

    Both times are kept until the request's first output.
    """

    def __init__(self) -> None:
        self._submitted: dict[str, float] = {}
        self._scheduled: dict[str, float] = {}

    def submitted(self, request: EngineRequest, now: float) -> None:
        """Record that a request enters the queue, if its call is sampled."""
        if request.traceparent and is_sampled(request.traceparent):
            self._submitted[request.request_id] = now

    def scheduled(self, request_ids: Iterable[str], now: float) -> None:
        """Record the start of a step that computes these requests."""
        if self._submitted:
            for request_id in request_ids:
                if request_id in self._submitted:
                    self._scheduled.setdefault(request_id, now)

    def add_times(self, outputs: Iterable[TokenOutput], now: float) -> None:
        """Set `times` (queue time and prefill time) of each output that is the first of its request, if the request's
        call is traced."""
        if self._submitted:
            for output in outputs:
                submitted = self._submitted.pop(output.request_id, None)
                if submitted is not None:
                    scheduled = self._scheduled.pop(output.request_id, submitted)
                    output.times = RequestTimes(queue_s=scheduled - submitted, prefill_s=now - scheduled)

    def forget(self, request_id: str) -> None:
        """Forget an aborted request."""
        self._submitted.pop(request_id, None)
        self._scheduled.pop(request_id, None)
