"""Keep-alives: messages that report the progress of a call while it has no output to send."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from cluster.gateway.calls.call import Call
from cluster.gateway.calls.open_calls import OpenCalls
from cluster.gateway.models.directory import ModelDirectory
from cluster.gateway.models.start_progress import expected_progress
from cluster.gateway.scheduling.scheduler import Scheduler

log = structlog.get_logger("calls")

START_PROGRESS_S = 1.0
"""Interval in seconds of the progress reports to a call that waits for its model to start."""


@dataclass(frozen=True, slots=True)
class CallProgress:
    """Progress of a call that has no output to send.

    `state`: `queued`, `prefill`, `running`, or `resuming` if the call's worker was lost. While the model has no
    worker, `state` is the state of the model. `queue_position`: counted from 1; 0 if the call is not queued. While
    the model has no worker, `fraction` is the progress of its start, in [0, 1], and `eta_s` is the remaining time
    in seconds. The two values are estimated from earlier starts; an unknown value is 0.
    """

    state: str
    queue_position: int
    fraction: float = 0.0
    eta_s: float = 0.0


ProgressOf = Callable[[Call], CallProgress]
"""Function that returns the progress of a silent call."""


class KeepAlives:
    """The keep-alives of one gateway's open calls."""

    def __init__(
        self, calls: OpenCalls, scheduler: Scheduler, directory: ModelDirectory, clock: Callable[[], float]
    ) -> None:
        self._calls = calls
        self._scheduler = scheduler
        self._directory = directory
        self._clock = clock

    async def run(self, keepalive_s: float) -> None:
        """Send keep-alives, end calls that have waited too long, and update the counts of tokens that tenants have been
        served. A call gets a keep-alive after `keepalive_s` seconds of silence, or after START_PROGRESS_S if no worker
        serves its model. Runs until cancelled, with a pass every 0.25 s or less."""
        while True:
            await asyncio.sleep(min(keepalive_s / 4, 0.25))
            try:
                self._scheduler.upkeep.expire()
            except Exception:  # the next pass and all other calls must still run
                log.exception("call.expiry_failed")
            now = self._clock()
            for call in self._calls:
                try:
                    self._update(call, now, keepalive_s)
                except Exception as error:
                    call.fail_unexpectedly(error)

    def _update(self, call: Call, now: float, keepalive_s: float) -> None:
        self._scheduler.follow(call)
        silent_s = call.output.silent_s(now)
        if silent_s >= keepalive_s or (silent_s >= START_PROGRESS_S and self._waits_for_start(call)):
            call.output.fall_silent(now)

    def _waits_for_start(self, call: Call) -> bool:
        """Return whether the call waits for a model that no worker serves."""
        if call.first_token_at is not None:
            return False
        model = self._directory.find(call.model)
        return model is not None and not model.served

    def progress(self, call: Call) -> CallProgress:
        """Return the progress of a silent call."""
        queues, model = self._scheduler.queues, self._directory.find(call.model)
        position = queues.position(call)
        if model is not None and not model.links:
            fraction, eta_s = expected_progress(model.entry, time.time())
            return CallProgress(model.state.lower(), position, fraction, eta_s)
        if queues.is_resuming(call):
            return CallProgress("resuming", position)
        return CallProgress(
            "queued" if position else "running" if call.first_token_at is not None else "prefill", position
        )
