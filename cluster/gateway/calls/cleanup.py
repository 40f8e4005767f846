"""Cleanup at the end of a call. Each step that acquires something for the call registers an undo step. If an undo step
fails, the other undo steps still run.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import structlog

from cluster.api.outcomes import Outcome
from cluster.process.call_errors import is_call_failure

log = structlog.get_logger("calls")

Subject = TypeVar("Subject")
Undo = Callable[[Subject, Outcome], Awaitable[None] | None]
"""Undo step. Its arguments are the `subject` of `Cleanup.add` and the outcome of the call."""


class Cleanup:
    """Undo steps of one call, which run at the end of the call."""

    def __init__(self, log_fields: Mapping[str, str]) -> None:
        """`log_fields`: fields of log lines about the call."""
        self.outcome = Outcome.OK
        """Outcome of the call, an argument of every step."""
        self._log_fields = log_fields
        # Subjects and their steps in turns. Steps that bind their subject, such as lambdas, would be several objects
        # each, and every call has ten steps.
        self._added: list[Any] = []

    def add(self, subject: Subject, steps: Sequence[Undo[Subject]]) -> None:
        """Register `steps`, which run at the end of the call and release something that was acquired for the call.
        `subject`: the first argument of the steps. If the steps may run even though the acquisition has failed, call
        this method before the acquisition, else after it."""
        self._added += (subject, steps)

    async def run(self) -> None:
        """Run all steps, the last registered step first. A step may return an awaitable that waits for a store. These
        awaitables are awaited after all steps were called, so that slots and accounts are released without waiting.
        Exceptions of steps are logged. A cancellation or exit is raised again at the end."""
        waiting: list[Awaitable[None]] = []
        stopped: BaseException | None = None
        added = self._added
        for at in range(len(added) - 2, -1, -2):
            subject, steps = added[at], added[at + 1]
            for step in reversed(steps):
                try:
                    rest = step(subject, self.outcome)
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
