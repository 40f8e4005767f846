"""The steps and aborts of a worker's engine. No step waits for a link. A failed abort stops neither the steps nor a
link.

Outputs go into the links' outboxes (wire/outbox.py), from which each link's writer sends them.
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
        """`counts` returns the engine's own counts of preemptions and of the prefix cache."""
        self.engine = engine
        self.parser: OutputParsers = parser or NoParsers()
        self.steps = 0
        self._counts = counts
        self._busy_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._deaths: asyncio.Queue[EngineDead] = asyncio.Queue()

    async def run(self, request_outputs: RequestOutputs, credit: LinkCredit) -> None:
        """Run steps until cancelled; put their outputs into the links' outboxes and renew credit. Raises EngineDead."""
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
        """Put parsed outputs into the links' outboxes until cancelled. No output waits for the engine's next step."""
        while True:
            touched, to_abort = request_outputs.apply_parsed(await self.parser.parsed())
            if to_abort:
                await self.abort(to_abort)
                credit.regrant()
            for link in touched:
                link.outbox.flush()

    def work(self, request_outputs: RequestOutputs) -> ComputedWork:
        """Return the work that the engine has computed so far."""
        return ComputedWork(
            self.steps, self._busy_s, request_outputs.prefilled_tokens, request_outputs.decoded_tokens, *self._counts()
        )

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Abort requests in the engine. Errors are logged; EngineDead goes to `report_dead`."""
        if not request_ids:
            return
        try:
            await self.engine.abort(request_ids)
        except EngineDead as dead:
            self.report_dead(dead)
        except Exception:  # these requests run on; the link and the engine loop must keep serving others
            log.exception("engine.abort_failed", requests=len(request_ids))

    def abort_in_background(self, request_ids: Sequence[str]) -> None:
        """Abort requests in a task of their own, which the end of a link does not cancel."""
        task = asyncio.create_task(self.abort(request_ids))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def report_dead(self, error: EngineDead) -> None:
        """Record that a call of the engine raised EngineDead, so that `wait_dead` raises `error`."""
        self._deaths.put_nowait(error)

    async def wait_dead(self) -> None:
        """Wait until EngineDead is reported, and raise it."""
        raise await self._deaths.get()

    async def finish(self) -> None:
        """Wait for the aborts in progress."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
