"""The tasks that prepare and load adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

import structlog

from cluster.api.ports import EngineDead, EngineRefused

log = structlog.get_logger("worker")


class AdapterTasks:
    """The running tasks of one worker's adapters. Errors of a task are logged, except EngineRefused and EngineDead,
    which the task itself reports."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run `work` in a task."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    async def cancel(self) -> None:
        """Cancel all tasks and wait for their end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, EngineRefused | EngineDead):
            log.error("adapter.task_failed", error=f"{type(error).__name__}: {error}")
