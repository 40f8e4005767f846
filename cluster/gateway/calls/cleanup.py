"""What a call gives back at its end: each acquisition registers its undo, and one that fails loses no other."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable

import structlog

from cluster.api.outcomes import Outcome
from cluster.process.call_errors import is_call_failure

log = structlog.get_logger("calls")

Undo = Callable[[Outcome], Awaitable[None] | None]


class Cleanup:
    """The undo steps of one call."""

    def __init__(self, request_id: str) -> None:
        self.outcome = Outcome.OK
        """How the call has ended; every step is called with it."""
        self._request_id = request_id
        self._steps: list[Undo] = []

    def add(self, undo: Undo) -> None:
        """Register the undo of what is acquired next. Steps must be idempotent or be added after the acquisition."""
        self._steps.append(undo)

    async def run(self) -> None:
        """Take every step, the last first. Those that wait for a store come after all others, so that places and
        accounts are free at once. What a step raises is logged; a cancellation is raised again after the last."""
        waiting: list[Awaitable[None]] = []
        stopped: BaseException | None = None
        for step in reversed(self._steps):
            try:
                rest = step(self.outcome)
            except BaseException as error:
                stopped = self._caught(error) or stopped
                continue
            if inspect.isawaitable(rest):
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
        log.error("call_end_failed", request_id=self._request_id, exc_info=error)
        return None
