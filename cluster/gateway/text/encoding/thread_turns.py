"""Threads in which long texts are tokenized without a helper process. Tenants take turns."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final
from weakref import WeakKeyDictionary

from cluster.gateway.helpers.job_queue import JobQueue

THREADS: Final = min(os.cpu_count() or 1, 8)
"""Number of threads, no more than cores. Everything but the Rust tokenizer runs under the GIL anyway."""
_EXECUTOR = ThreadPoolExecutor(THREADS, thread_name_prefix="encode")


class ThreadTurns:
    """The threads of one event loop. While all threads are busy, the jobs of the tenants are begun in turns, so that no
    tenant's backlog delays another tenant by more than one job."""

    def __init__(self, threads: int = THREADS) -> None:
        """`threads`: number of jobs that run at once, at most THREADS."""
        self._free = threads
        self._queue = JobQueue[None]()

    async def run(self, tenant: str, work: Callable[[], Any]) -> Any:
        """Do the work in a thread, and return its result."""
        if self._free:
            self._free -= 1
        else:
            turn = self._queue.add(tenant)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._pass_on()
                raise
        future = asyncio.get_running_loop().run_in_executor(_EXECUTOR, work)
        future.add_done_callback(lambda _: self._pass_on())
        return await future

    def _pass_on(self) -> None:
        """Give the turn to the next job, or note that a thread is free."""
        if (turn := self._queue.pop()) is not None:
            turn.set_result(None)
        else:
            self._free += 1

    def __repr__(self) -> str:
        return f"ThreadTurns({self._free} free)"


_TURNS: WeakKeyDictionary[asyncio.AbstractEventLoop, ThreadTurns] = WeakKeyDictionary()


def thread_turns() -> ThreadTurns:
    """Return the threads of the running event loop. All models share them."""
    loop = asyncio.get_running_loop()
    if (turns := _TURNS.get(loop)) is None:
        turns = _TURNS[loop] = ThreadTurns()
    return turns
