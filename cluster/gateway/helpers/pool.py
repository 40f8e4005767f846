"""A pool of helper processes for a gateway's CPU-bound work, so that the event loop never waits for that work.

Problem: parsing, rendering and tokenizing hold the GIL for milliseconds at a time even in a thread, and the event loop
waits for the GIL after every system call. With many such threads the waits add up to a quarter of a second. The first
job starts the helpers (process.py) and waits 0.2 to 0.6 s for the first helper. Helpers run at idle priority
(SCHED_IDLE) and exit after a time without work. If no helper can be started, or a helper gets no core for seconds, also
while it starts, `run` returns None and the caller does the work itself.

Tenants take turns: of the tenants with waiting jobs, the tenant that was served longest ago is next. Each job has a CPU
limit; a job that exceeds the limit raises TooMuchCpu. A job that kills two helpers in a row raises JobLost and is not
tried again, neither in a third helper nor in the gateway's own process.

Why idle priority: Linux treats a core that runs only an idle-priority process as free, and moves the event loop to this
core. If the helpers only had a higher nice value, the event loop would wait behind other processes, 15 to 30 ms at a
time. Why a session for each helper: where Linux divides the CPU by session (autogroup, the default outside of control
groups), helpers in the gateway's session would use up the gateway's share.
"""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections.abc import Callable
from typing import Any, Final

import structlog

from cluster.api.outcomes import CallError
from cluster.gateway.helpers.helper_process import HelperProcess, Setup, start_helper
from cluster.gateway.helpers.job_queue import JobQueue
from cluster.gateway.helpers.wire import OK, REFUSED, Job
from cluster.observe.log import call_fields
from cluster.process.background import run_when_idle

log = structlog.get_logger("text")

MAX_HELPERS: Final = 4
MAX_FAILURES: Final = 3
"""Number of helpers that may be lost in succession without completing a job. After that no helper is started for
RETRY_S."""
RETRY_S: Final = 60.0
MAX_LOSSES: Final = 2
"""Number of helpers that may be lost while running the same job. After that the job is not tried again."""
CPU_S, CPU_S_PER_MB = 10.0, 4.0
"""CPU limit of a job in seconds, and the addition to the limit per megabyte of the job's data. Legitimate jobs use a
hundredth to a tenth of their limit."""
PATIENCE_S: Final = 2.0
"""Seconds after which a helper that has not answered is late; the job's data adds a second per megabyte. No other job
waits for a late helper. If a late helper has got less than LEAST_SHARE of a core, the caller does the work itself."""
LEAST_SHARE: Final = 0.2
TOO_MUCH: Final = "too much"
"""Kind of the answer of a helper whose job has exceeded the CPU limit; see wire.py for the other kinds."""


class TooMuchCpu(Exception):
    """The error of a job that has exceeded its CPU limit."""


class JobLost(Exception):
    """The error of a job that lost MAX_LOSSES helpers or raised an unexpected exception."""


class HelperPool:
    """A pool of helper processes for one kind of job. A pool belongs to one event loop."""

    def __init__(self, setup: Setup, size: int | None = None, patience_s: float = PATIENCE_S) -> None:
        """`size`: maximum number of helpers; by default the number of cores, up to MAX_HELPERS. `patience_s`: seconds
        after which a helper that has not finished a small job counts as late."""
        self._setup = setup
        self.patience_s = patience_s
        """Seconds after which a helper without an answer to a small job is late; see PATIENCE_S."""
        self.cpu_s = CPU_S
        """CPU limit of a small job, in seconds."""
        self._size = size or min(os.cpu_count() or 1, MAX_HELPERS)
        self._helpers: set[HelperProcess] = set()
        self._idle: list[HelperProcess] = []
        self._late: set[HelperProcess] = set()
        self._queue = JobQueue[HelperProcess | None]()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._starting = self._start_is_late = False
        self.failures = 0
        """Number of helpers lost since a helper last completed a job."""
        self._failed_at = 0.0
        self._closed = False
        self._end = weakref.finalize(self, _end_all, self._helpers)

    @property
    def pids(self) -> frozenset[int]:
        """Process ids of the running helpers."""
        return frozenset(helper.pid for helper in self._helpers)

    async def run(
        self,
        job: Job,
        *,
        size: int = 0,
        tenant: str = "",
        local_fallback: bool = True,
        then: Callable[[Any], Job | None] | None = None,
    ) -> Any:
        """Run a job in a helper process and return its result. Returns None if no helper is available in time; then the
        caller must do the work itself.

        `size`: number of bytes that the job works on; the time limits grow with it. `tenant`: the tenant for which the
        job runs. `local_fallback`: False if the caller cannot do the work itself; then a job that a helper has begun is
        awaited even if the helper gets no CPU time. `then`: takes the result of the job and returns a second job, or
        None. The same helper runs the second job, and `run` returns the second job's result.

        Raises the CallError of a job, TooMuchCpu or JobLost.
        """
        for _ in range(MAX_LOSSES):
            helper = await self._acquire(tenant)
            if helper is None:
                return None
            # The job completes even if its caller is cancelled, because its answer must be read from the socket.
            patience_s = self.patience_s + size / 1e6
            work = self._spawn(self._work(helper, job, then, patience_s, self.cpu_s + CPU_S_PER_MB * size / 1e6))
            if not local_fallback:
                await asyncio.wait({work})
            elif not await _wait_while_running(work, helper, patience_s):
                return None
            answer: tuple[str, Any] | None = work.result()
            if answer is not None:
                return _result(*answer)
            if self._closed:
                return None
        raise JobLost("its helpers ended")

    async def ready(self) -> bool:
        """Wait until all helpers have started. Returns False if no helper could be started."""
        if not self._helpers:
            self._start()
        while self._starting:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        return bool(self._helpers)

    def close(self) -> None:
        """End all helpers. The callers of running jobs do the work themselves."""
        self._closed = True
        self._end()
        self._idle.clear()
        self._release_waiting()

    async def _acquire(self, tenant: str = "") -> HelperProcess | None:
        if self._idle:
            return self._idle.pop()
        self._start()
        if not self._may_become_free:
            return None
        future = self._queue.add(tenant)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and (helper := future.result()) is not None:
                self._release(helper)
            raise

    def _release(self, helper: HelperProcess) -> None:
        """Assign a free helper to the next waiting job, or make it idle."""
        if (future := self._queue.pop()) is not None:
            future.set_result(helper)
            return
        self._idle.append(helper)

    async def _work(
        self, helper: HelperProcess, job: Job, then: Callable[[Any], Job | None] | None, patience_s: float, cpu_s: float
    ) -> tuple[str, Any] | None:
        """Run a job on a helper. Returns the helper's answer (a status and a value), or None if the helper was lost.

        `then`: takes the result of the first job and returns a second job, or None. The helper runs the second job
        next, and the answer to this job is returned instead. `patience_s`: seconds after which the helper counts as
        late. `cpu_s`: CPU limit of each job.
        """
        late = asyncio.get_running_loop().call_later(patience_s, self._mark_late, helper)
        try:
            answer = await helper.do(job, cpu_s)
            if then is not None and answer[0] == OK and (second := then(answer[1])) is not None:
                answer = await helper.do(second, cpu_s)
        except OSError as error:
            if helper in self._helpers and await asyncio.to_thread(lambda: helper.out_of_time):
                self._replace_stopped(helper, job[0], cpu_s)
                return TOO_MUCH, None
            self._remove_lost(helper, error)
            return None
        except BaseException:  # cancelled with the event loop, so the socket's contents are undefined
            self._remove_lost(helper, None)
            raise
        finally:
            late.cancel()
            self._late.discard(helper)
        self.failures = 0
        if helper in self._helpers:
            self._release(helper)
        return answer

    def _replace_stopped(self, helper: HelperProcess, method: str, cpu_s: float) -> None:
        """Replace a helper that ended because its job exceeded the CPU limit. This end does not count as a failure of
        the helper."""
        log.warning("helper.stopped", **call_fields(), job=method, cpu_s=round(cpu_s, 1))
        self._helpers.discard(helper)
        helper.end()
        self._start()
        self._release_waiting()

    def _mark_late(self, helper: HelperProcess) -> None:
        log.warning("helper.delayed", **call_fields(), pid=helper.pid)
        self._late.add(helper)
        self._release_waiting()

    def _mark_start_late(self) -> None:
        log.warning("helper.delayed", **call_fields(), pid=None)
        self._start_is_late = True
        self._release_waiting()

    @property
    def _may_become_free(self) -> bool:
        """Whether a helper may soon become free."""
        return (self._starting and not self._start_is_late) or bool(self._helpers - self._late)

    def _remove_lost(self, helper: HelperProcess, error: OSError | None) -> None:
        if helper not in self._helpers:
            return
        self._helpers.discard(helper)
        helper.end()
        if error is not None:
            self._count_failure(error)

    def _count_failure(self, error: Exception) -> None:
        self.failures += 1
        self._failed_at = time.monotonic()
        log.warning("helper.lost", **call_fields(), error=str(error), started_again=self.failures < MAX_FAILURES)
        self._release_waiting()

    def _release_waiting(self) -> None:
        """Let the callers of waiting jobs do the work themselves, unless a helper may soon become free."""
        while not self._may_become_free and (future := self._queue.pop()) is not None:
            future.set_result(None)

    def _start(self) -> None:
        hopeless = self.failures >= MAX_FAILURES and time.monotonic() < self._failed_at + RETRY_S
        wanted = len(self._helpers) < self._size and not hopeless
        if wanted and not (self._starting or self._closed):
            self._starting = True
            self._spawn(self._begin())

    async def _begin(self) -> None:
        """Start a helper. Once the helper is ready, start the next. All helpers are started early, because each start
        blocks the event loop briefly."""
        late = asyncio.get_running_loop().call_later(self.patience_s, self._mark_start_late)
        try:
            helper = await start_helper(self._setup, CPU_S)
        except OSError as error:
            self._starting = False
            self._count_failure(error)
            return
        except BaseException:  # no thread available, or the event loop ends
            self._starting = False
            self._release_waiting()
            raise
        finally:
            late.cancel()
            self._start_is_late = False
        run_when_idle(helper.pid)  # not earlier, because callers wait for the start, which must get a core
        self._starting = False
        if self._closed:
            helper.end()
            self._release_waiting()
            return
        self._helpers.add(helper)
        self._release(helper)
        self._start()

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _wait_while_running(work: asyncio.Task[Any], helper: HelperProcess, patience_s: float) -> bool:
    """Wait for a job: first `patience_s` seconds, then as long as the helper gets at least LEAST_SHARE of a core.
    Returns whether the job is done."""
    used_s = helper.cpu_s()
    while True:
        done, _ = await asyncio.wait({work}, timeout=patience_s)
        if done:
            return True
        before_s, used_s = used_s, helper.cpu_s()
        if used_s - before_s < LEAST_SHARE * patience_s:
            return False


def _result(kind: str, value: Any) -> Any:
    if kind == OK:
        return value
    if kind == REFUSED:
        assert isinstance(value, CallError)
        raise value
    raise TooMuchCpu if kind == TOO_MUCH else JobLost(value)


def _end_all(helpers: set[HelperProcess]) -> None:
    while helpers:
        helpers.pop().end()
