"""The steps and aborts of a worker's engine. The outputs of a step are put into the links' outboxes (wire/outbox.py),
and each link's writer sends them from there. So a slow link never delays a step.

If an abort fails, the engine's steps and the links continue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from cluster.api.demand import ComputedWork, EngineCounts
from cluster.api.ports import Engine, EngineDead
from cluster.worker.link_credit import LinkCredit
from cluster.worker.parsing.port import NoParsers, OutputParsers
from cluster.worker.request_outputs import RequestOutputs

log = structlog.get_logger("worker")


class EngineRunner:
    """Runs the steps and aborts of one engine, counts the computed work, and reports when the engine is dead."""

    def __init__(
        self,
        engine: Engine,
        parser: OutputParsers | None = None,
        counts: Callable[[], EngineCounts] = EngineCounts,
    ) -> None:
        """Create the runner. `counts`: returns the engine's own counts of preemptions and of the prefix cache."""
        self.engine = engine
        self.parser: OutputParsers = parser or NoParsers()
        self.steps = 0
        self._counts = counts
        self._busy_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._deaths: asyncio.Queue[EngineDead] = asyncio.Queue()

    async def run(self, request_outputs: RequestOutputs, credit: LinkCredit) -> None:
        """Run steps until cancelled. After each step, put its outputs into the links' outboxes and grant new credit.

        Raises EngineDead.
        """
        while True:
            outputs = await self.engine.step()
            self.steps += 1
            outputs, diverted = self.parser.divert(outputs)
            touched, to_abort = request_outputs.apply_step(outputs, diverted)
            if to_abort:
                await self.abort(to_abort)
            load = self.engine.load()
            self._busy_s += load.step_s
            credit.regrant()
            for link in touched:
                link.outbox.load(load)
                link.outbox.flush()

    async def run_parsed(self, request_outputs: RequestOutputs, credit: LinkCredit) -> None:
        """Put parsed outputs into the links' outboxes until cancelled.

        Parsed outputs are sent at once, not with the engine's next step.
        """
        while True:
            touched, to_abort = request_outputs.apply_parsed(await self.parser.parsed())
            if to_abort:
                await self.abort(to_abort)
                credit.regrant()
            for link in touched:
                link.outbox.flush()

    def work(self, request_outputs: RequestOutputs) -> ComputedWork:
        """Return counts of the work that the engine has computed since its start. The numbers of prefilled and decoded
        tokens come from `request_outputs`."""
        return ComputedWork(
            self.steps, self._busy_s, request_outputs.prefilled_tokens, request_outputs.decoded_tokens, *self._counts()
        )

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Abort requests in the engine. Errors are logged; EngineDead is passed to `report_dead`."""
        if not request_ids:
            return
        try:
            await self.engine.abort(request_ids)
        except EngineDead as dead:
            self.report_dead(dead)
        except Exception:  # these requests run on; the link and the engine loop must keep serving others
            log.exception("engine.abort_failed", requests=len(request_ids))

    def abort_in_background(self, request_ids: Sequence[str]) -> None:
        """Abort requests in a separate task. The end of a link does not cancel this task."""
        task = asyncio.create_task(self.abort(request_ids))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def report_dead(self, error: EngineDead) -> None:
        """Record that a call of the engine has raised EngineDead. `wait_dead` then raises this error."""
        self._deaths.put_nowait(error)

    async def wait_dead(self) -> None:
        """Wait until EngineDead is reported; raise it."""
        raise await self._deaths.get()

    async def finish(self) -> None:
        """Wait for the aborts in progress."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
