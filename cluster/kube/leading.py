"""Leadership of one process. The leader's work runs only while the process holds the Lease."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

import structlog

from cluster.kube.api import ApiUnavailable, Conflict, LeaseStore
from cluster.kube.lease import LeaseCandidate, LeaseTerms

log = structlog.get_logger("lease")

GIVE_UP_WRITES = 3
"""Writes with which a Lease is given up. Only one renewal can be on its way, so the second write can conflict only with
another process."""

Work = Callable[[asyncio.Event], Awaitable[None]]
"""Coroutine function with the leader's work. When the event, its argument, is set, the work must end soon."""


class WorkNotStopped(Exception):
    """Error: the work did not stop before the term of the Lease ended, so the whole process must exit."""


class Leader:
    """Runs work while this process, named `me`, holds the Lease."""

    def __init__(
        self,
        store: LeaseStore,
        me: str,
        terms: LeaseTerms | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._candidate = LeaseCandidate(me, terms or LeaseTerms())
        self._terms = self._candidate.terms
        self._clock_s = clock_s
        self._logged_error = ""

    def __repr__(self) -> str:
        return f"Leader({self._candidate.me}, {'leads' if self.leads else 'waits'})"

    @property
    def leads(self) -> bool:
        """Whether this process holds the Lease and may act now."""
        return self._candidate.may_act(self._clock_s())

    async def run(self, work: Work, stop: asyncio.Event) -> None:
        """Run `work` whenever this process holds the Lease, until `stop` is set; then give up the Lease.

        Raises the exceptions of `work`, and WorkNotStopped.
        """
        while not stop.is_set():
            await self._check_record()
            if self.leads:
                await self._lead(work, stop)
            else:
                await _wait_first(stop.wait(), asyncio.sleep(self._terms.again_s))

    async def _lead(self, work: Work, stop: asyncio.Event) -> None:
        log.info("lease.acquired", holder=self._candidate.me)
        leave = asyncio.Event()
        running = asyncio.ensure_future(work(leave))
        stopping = asyncio.ensure_future(stop.wait())
        keeping = asyncio.ensure_future(self._keep())
        try:
            await asyncio.wait({running, stopping, keeping}, return_when=asyncio.FIRST_COMPLETED)
            leave.set()
            # While the Lease is held the work may take any time to stop; after that, only the rest of the term.
            await asyncio.wait({running, keeping}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({running}, timeout=self._terms.lease_s - self._terms.yield_s)
            if not running.done():
                raise WorkNotStopped("the Lease is lost, but the work has not stopped: this process must exit")
        finally:
            for part in (running, stopping, keeping):
                part.cancel()
            await asyncio.gather(running, stopping, keeping, return_exceptions=True)
        if self.leads:
            await self._give_up()
        log.info("lease.released", holder=self._candidate.me)
        running.result()  # raises the error of failed work, now that another process can take the Lease

    async def _keep(self) -> None:
        """Renew the Lease periodically. Returns when the Lease is lost."""
        while self.leads:
            left_s = self._candidate.acts_until_s() - self._clock_s()
            await asyncio.sleep(min(self._terms.again_s, left_s))
            left_s = self._candidate.acts_until_s() - self._clock_s()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(left_s, 0)):
                    await self._check_record()

    async def _check_record(self) -> None:
        """Read the record, and write it if the Lease must be taken or renewed. Errors of the API are logged."""
        try:
            record = await asyncio.to_thread(self._store.read)
            self._candidate, write = self._candidate.observe(record, self._clock_s())
            if write is not None:
                began_s = self._clock_s()
                new_record = await asyncio.to_thread(self._store.write, self._candidate.me, write.over)
                self._candidate = self._candidate.written(new_record, began_s)
            self._logged_error = ""
        except Conflict as error:
            log.info("lease.write_lost", reason=str(error))
        except ApiUnavailable as error:
            if str(error) != self._logged_error:
                log.warning("lease.api_unavailable", reason=str(error))
            self._logged_error = str(error)

    async def _give_up(self) -> None:
        """Remove the holder from the Lease, so that the next process can take the Lease at once. Errors are ignored,
        since the Lease expires anyway."""
        seen = self._candidate.seen
        self._candidate = LeaseCandidate(self._candidate.me, self._terms)
        with contextlib.suppress(ApiUnavailable):
            for _ in range(GIVE_UP_WRITES):
                try:
                    await asyncio.to_thread(self._store.write, "", seen)
                    return
                except Conflict:
                    # A renewal whose answer was not waited for has changed the record, or another process has.
                    seen = await asyncio.to_thread(self._store.read)
                if seen is None or seen.holder != self._candidate.me:
                    return


async def _wait_first(*waits: Awaitable[object]) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
