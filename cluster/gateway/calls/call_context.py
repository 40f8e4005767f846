"""The asynchronous context manager in which a call is open. When the context ends, the call's outcome is determined and
the call's cleanup runs.

The context manager is a class and not a generator, because a class is faster and every call has a context manager.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

import structlog

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.calls.call_opening import CallOpening
from cluster.gateway.calls.cleanup import Cleanup
from cluster.process.call_errors import is_call_failure

log = structlog.get_logger("calls")

DEADLINE_SLACK_S: Final = 0.1
"""Seconds before a call's deadline from which a cancellation counts as DEADLINE_EXCEEDED. The caller's clock for the
deadline started before the request arrived here, so the deadline passes at the caller first."""


Opened = TypeVar("Opened")
AnyOpening = TypeVar("AnyOpening", bound=CallOpening)


class CallContext(Generic[AnyOpening, Opened]):
    """The asynchronous context manager of one call."""

    __slots__ = ("_begin", "_cleanup", "_clock", "_opening")

    def __init__(
        self,
        opening: AnyOpening,
        begin: Callable[[AnyOpening, Cleanup], Awaitable[Opened]],
        at_end: Sequence[Callable[[AnyOpening, Outcome], None]],
        clock: Callable[[], float],
    ) -> None:
        """`begin`: takes the steps from the request to a queued call; each step registers its undo step. `at_end`:
        functions that are called after the end of the call, in reverse order. `clock`: the clock of the call's
        deadline."""
        self._opening = opening
        self._begin = begin
        self._clock = clock
        self._cleanup = Cleanup(opening.log_fields)
        self._cleanup.add(opening, at_end)

    async def __aenter__(self) -> Opened:
        try:
            return await self._begin(self._opening, self._cleanup)
        except BaseException as error:
            await self.__aexit__(type(error), error, None)
            raise

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            if error is not None:
                self._cleanup.outcome = self._outcome_of(error)
        finally:
            await self._cleanup.run()
        if error is not None and not isinstance(error, Exception) and self._cleanup.outcome is Outcome.INTERNAL:
            message = f"unexpected failure; quote request id {self._opening.meta.request_id}"
            raise CallError(Outcome.INTERNAL, message) from error  # an Exception is answered by the API

    def _outcome_of(self, error: BaseException) -> Outcome:
        """Return the outcome of a call whose context has raised `error`. An error that ends the process is not counted
        against the call: the outcome stays OK."""
        if isinstance(error, CallError):
            return error.outcome
        if isinstance(error, asyncio.CancelledError):
            deadline = self._opening.meta.deadline
            late = deadline is not None and self._clock() >= deadline - DEADLINE_SLACK_S
            return Outcome.DEADLINE_EXCEEDED if late else Outcome.CANCELLED
        if not is_call_failure(error):
            return Outcome.OK
        log.error("call.failed", **self._opening.log_fields, exc_info=error)
        return Outcome.INTERNAL
