"""Cleanup at the end of a call. Each acquisition registers an undo step. If an undo step fails, the other steps still
run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import structlog

from cluster.api.outcomes import Outcome
from cluster.process.call_errors import is_call_failure

log = structlog.get_logger("calls")

Undo = Callable[[Outcome], Awaitable[None] | None]


class Cleanup:
    """Undo steps of one call, which run at the end of the call."""

    def __init__(self, log_fields: Mapping[str, str]) -> None:
        """`log_fields`: fields of log lines about the call."""
        self.outcome = Outcome.OK
        """Outcome of the call. Every step gets the outcome as its argument."""
        self._log_fields = log_fields
        self._steps: list[Undo] = []

    def add(self, undo: Undo) -> None:
        """Register the undo step of an acquisition. Call this before the acquisition if the step may also run after a
        failed acquisition, otherwise after the acquisition."""
        self._steps.append(undo)

    async def run(self) -> None:
        """Run all steps, the last registered step first. Awaitable steps may wait for a store. They finish after all
        other steps, so that slots and accounts are freed at once. Exceptions of steps are logged. A cancellation is
        raised again after the last step."""
        waiting: list[Awaitable[None]] = []
        stopped: BaseException | None = None
        for step in reversed(self._steps):
            try:
                rest = step(self.outcome)
            except BaseException as error:
                stopped = self._caught(error) or stopped
                continue
            if rest is not None:
                waiting.append(rest)
        for rest in waiting:
            try:
                await rest
            except BaseException as error:
                stopped = self._caught(error) or stopped
        if stopped is not None:
            raise stopped

    def _caught(self, error: BaseException) -> BaseException | None:
        if not is_call_failure(error):
            return error
        log.error("call.cleanup_failed", **self._log_fields, exc_info=error)
        return None
