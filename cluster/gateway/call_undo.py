"""The undo steps of calls: what happens to the quota, queue entries, accounts and prompt log of a call when the call
ends."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING

from cluster.api.outcomes import Outcome
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.open_calls import OpenCalls
from cluster.gateway.calls.opening import Opening
from cluster.gateway.calls.pooling.pooling_opening import PoolingOpening
from cluster.gateway.quotas.reservations import QuotaReservations
from cluster.gateway.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from cluster.gateway.guards.guards import CallGuards
    from cluster.gateway.usage.prompt_log import PromptLog


class UndoSteps:
    """Functions that undo, at the end of a call, what the call has taken in its gateway. A call's Cleanup runs them.

    `close`: for a call that is registered as open. `quota`: for a call with reserved tokens. `schedule`: for a call
    that was passed to the scheduler.
    """

    def __init__(
        self, calls: OpenCalls, reservations: QuotaReservations, scheduler: Scheduler, prompts: PromptLog | None
    ) -> None:
        """`prompts`: the prompt log; None if no prompts are logged."""
        self._calls = calls
        self._reservations = reservations
        self._scheduler = scheduler
        self._prompts = prompts
        self.close = (self._remove,) if prompts is None else (self._remove, self._log_prompt)
        self.quota = (self._settle_quota,)
        self.schedule = (self._end_account, scheduler.routes.ended, scheduler.canaries.ended, self._leave)

    def _remove(self, opening: Opening | PoolingOpening, outcome: Outcome) -> None:
        if opening.call is not None:
            self._calls.remove(opening.call)

    def _log_prompt(self, opening: Opening | PoolingOpening, outcome: Outcome) -> None:
        if self._prompts is not None and opening.call is not None:
            self._prompts.ended(opening.call, opening.prompt, opening.text, outcome)

    def _settle_quota(self, call: Call, outcome: Outcome) -> Awaitable[None]:
        return self._reservations.settle(call)

    def _end_account(self, call: Call, outcome: Outcome) -> None:
        if (accounting := self._scheduler.host.accounting) is not None:
            accounting.ended(call, outcome)

    def _leave(self, call: Call, outcome: Outcome) -> None:
        self._scheduler.leave(call)


def close_guards(guards: CallGuards, outcome: Outcome) -> None:
    """Close the guards of a call when the call ends, and so record the decisions of the guards. This is an undo
    step."""
    guards.close()
