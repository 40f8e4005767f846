"""The driver makes the calls of a plan through a client, at planned times or with fixed concurrency. A run always ends.

Open loop: a call is sent when it is due, however many calls are running. Closed loop: there are `concurrency` callers,
each of which makes its next call when its last call has ended. A server that dies ends the run early; the results until
then are kept.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from loadtests.faces.base import CallFailed, Face, Request
from loadtests.records import Record, Run, digest

DEAD_AFTER_FAILURES = 8
"""Number of consecutive calls that fail as if the server were gone, after which the server counts as gone."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Time limits in seconds: `call_s` for one call, `run_s` for the whole run."""

    call_s: float = 120.0
    run_s: float = 600.0


@dataclass(slots=True)
class Progress:
    """Counts of a run, to be shown during the run."""

    total: int
    sent: int = 0
    ended: int = 0
    failed: int = 0
    pieces: int = 0

    @property
    def running(self) -> int:
        """Number of calls in progress."""
        return self.sent - self.ended


OnStart = Callable[[Progress], None]


class _Ended(Exception):
    """Raised when a run ends before all calls of the plan are made. The message says why."""


class _Run:
    def __init__(self, face: Face, limits: Limits, progress: Progress) -> None:
        self.face = face
        self.limits = limits
        self.progress = progress
        self.records: list[Record] = []
        self.begin = time.perf_counter()
        self.dead = 0
        self.dead_begun = 0
        """How many of the `dead` calls had received a part of their answer."""
        self.answered = False
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def now(self) -> float:
        return time.perf_counter() - self.begin

    async def call(self, request: Request, due_s: float) -> None:
        record = Record(request.key, request.group, due_s, request.max_tokens)
        self.records.append(record)
        pieces: list[str] = []
        gaps, progress, clock, begin = record.gaps_s, self.progress, time.perf_counter, self.begin
        last = -1.0

        def on_text(text: str) -> None:
            nonlocal last
            now = clock() - begin
            if last < 0.0:
                record.first_s = now
            else:
                gaps.append(now - last)
            last = now
            pieces.append(text)
            progress.pieces += 1

        progress.sent += 1
        record.sent_s = self.now()
        try:
            async with asyncio.timeout(self.limits.call_s):
                answer = await self.face.run(request, on_text)
        except CallFailed as error:
            self._failed(record, error)
        except TimeoutError:
            self._failed(record, CallFailed(CallFailed.TIMEOUT, f"no end within {self.limits.call_s:g} s"))
        except asyncio.CancelledError:
            record.error, record.message = "not ended", "the run ended before this call"
            raise
        else:
            record.tokens = answer.completion_tokens if answer.completion_tokens is not None else len(pieces)
            record.prompt_tokens, record.cached_tokens = answer.prompt_tokens, answer.cached_tokens
            record.finish_reason = answer.finish_reason
            self.dead, self.dead_begun, self.answered = 0, 0, True
        finally:
            record.ended_s = self.now()
            record.pieces = len(pieces)
            record.last_s = last if last >= 0.0 else None
            record.text_digest = digest(pieces)
            progress.ended += 1

    def _failed(self, record: Record, error: CallFailed) -> None:
        record.error, record.message = error.kind, error.message
        self.progress.failed += 1
        self.dead = self.dead + 1 if error.fatal else 0
        self.dead_begun = self.dead_begun + (record.first_s is not None) if error.fatal else 0
        if self.dead >= DEAD_AFTER_FAILURES and not self.over.done():
            what = "the server died" if self.answered else "nobody answers"
            begun = f"{self.dead_begun} of them after the first token"
            self.over.set_exception(_Ended(f"{what}: {self.dead} calls in a row ended ({begun}): {error}"))

    async def open_loop(self, plan: Sequence[tuple[float, Request]]) -> None:
        async with asyncio.TaskGroup() as group:
            for due_s, request in plan:
                wait_s = due_s - self.now()
                await asyncio.sleep(max(wait_s, 0.0))
                group.create_task(self.call(request, due_s))

    async def closed_loop(self, requests: Sequence[Request], concurrency: int) -> None:
        remaining: Iterator[Request] = iter(requests)

        async def caller() -> None:
            for request in remaining:
                await self.call(request, self.now())
                if self.over.done():
                    return

        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(requests))):
                group.create_task(caller())

    async def bounded(self, work: asyncio.Task[None]) -> str:
        """Wait until all calls of the plan have ended, or until the run must end early. Return the reason for an early
        end, else ""."""
        try:
            await asyncio.wait((work, self.over), timeout=self.limits.run_s, return_when=asyncio.FIRST_COMPLETED)
            if self.over.done():
                return str(self.over.exception())
            if work.done():
                work.result()
                return ""
            return f"the run did not end within {self.limits.run_s:g} s"
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            if self.over.done():
                self.over.exception()
            self.over.cancel()


async def drive(
    face: Face,
    requests: Sequence[Request],
    *,
    concurrency: int | None = None,
    due_s: Sequence[float] | None = None,
    limits: Limits | None = None,
    on_start: OnStart | None = None,
) -> Run:
    """Make all calls: `concurrency` calls at once, or each call at its `due_s` (seconds from now). If the server fails,
    the failures are recorded in the result; no exception is raised."""
    if (concurrency is None) == (due_s is None):
        raise ValueError("give either concurrency (closed loop) or due_s (open loop)")
    progress = Progress(len(requests))
    if on_start is not None:
        on_start(progress)
    gc.collect()
    gc.freeze()  # existing objects stay; collections then traverse the run's own objects only
    cpu_s = time.process_time()
    run = _Run(face, limits or Limits(), progress)
    plan = (
        run.open_loop(list(zip(due_s, requests, strict=True)))
        if due_s is not None
        else run.closed_loop(requests, concurrency or 1)
    )
    try:
        problem = await run.bounded(asyncio.create_task(plan))
    finally:
        gc.unfreeze()
    duration_s, cpu_s = run.now(), time.process_time() - cpu_s
    if not problem and run.records and not run.answered and run.dead:
        problem = f"nobody answers: {run.records[-1].error}: {run.records[-1].message}"
    return Run(run.records, duration_s, cpu_s, problem)
