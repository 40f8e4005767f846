"""Cleanup at the end of a call: each acquisition registers its undo step; one that fails does not skip the others."""

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
        """Outcome of the call; every step is called with it."""
        self._request_id = request_id
        self._steps: list[Undo] = []

    def add(self, undo: Undo) -> None:
        """Register an undo step, before the acquisition if the step is idempotent, else after it."""
        self._steps.append(undo)

    async def run(self) -> None:
        """Run every step, the last one first. Awaitable steps, which may wait for a store, finish after all others, so
        that slots and accounts are freed at once. Exceptions of steps are logged; a cancellation is raised again after
        the last step."""
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
