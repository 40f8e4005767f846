"""Run something only while this process holds the Lease; when it no longer may, it is told to stop at once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

import structlog

from cluster.kube.api import ApiAway, Conflict, LeaseStore
from cluster.kube.lease import LeaseCandidate, LeaseTerms

log = structlog.get_logger("lease")

Work = Callable[[asyncio.Event], Awaitable[None]]
"""Runs until the event is set, and soon ends then."""


class StoodStill(Exception):
    """What this process ran did not stop in the time that the Lease leaves: it must end as a whole."""


class Leader:
    """`run` until `stop`; `leads` says how it stands."""

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
        self._told = ""

    def __repr__(self) -> str:
        return f"Leader({self._candidate.me}, {'leads' if self.leads else 'waits'})"

    @property
    def leads(self) -> bool:
        """Whether this process may act now."""
        return self._candidate.acts(self._clock_s())

    async def run(self, work: Work, stop: asyncio.Event) -> None:
        """Wait for the Lease, run `work` while it is held, again and again until `stop`. Then it is given up.

        Raises what `work` raises, and StoodStill.
        """
        while not stop.is_set():
            await self._look()
            if self.leads:
                await self._lead(work, stop)
            else:
                await _first(stop.wait(), asyncio.sleep(self._terms.again_s))

    async def _lead(self, work: Work, stop: asyncio.Event) -> None:
        log.info("leading", me=self._candidate.me)
        leave = asyncio.Event()
        running = asyncio.ensure_future(work(leave))
        stopping = asyncio.ensure_future(stop.wait())
        keeping = asyncio.ensure_future(self._keep())
        try:
            await asyncio.wait({running, stopping, keeping}, return_when=asyncio.FIRST_COMPLETED)
            leave.set()
            await asyncio.wait({running, keeping}, return_when=asyncio.FIRST_COMPLETED)  # it may take its time,
            await asyncio.wait({running}, timeout=self._terms.lease_s - self._terms.yield_s)  # but not the next one's
            if not running.done():
                raise StoodStill("the Lease is lost and what ran under it has not stopped")
            running.result()
        finally:
            for part in (running, stopping, keeping):
                part.cancel()
            await asyncio.gather(running, stopping, keeping, return_exceptions=True)
        if self.leads:
            await self._give_up()
        log.info("not_leading", me=self._candidate.me)

    async def _keep(self) -> None:
        """Write the record again and again; returns when this process may no longer act."""
        while self.leads:
            left_s = self._candidate.acts_until_s() - self._clock_s()
            await asyncio.sleep(min(self._terms.again_s, left_s))
            looking = asyncio.ensure_future(self._look())
            left_s = self._candidate.acts_until_s() - self._clock_s()
            await asyncio.wait({looking}, timeout=max(left_s, 0))
            if not looking.done():
                looking.cancel()
                return

    async def _look(self) -> None:
        """Read the record, and write it where the rule says so."""
        try:
            found = await asyncio.to_thread(self._store.read)
            self._candidate, take = self._candidate.look(found, self._clock_s())
            if take is not None:
                began_s = self._clock_s()
                record = await asyncio.to_thread(self._store.write, self._candidate.me, take.over)
                self._candidate = self._candidate.written(record, began_s)
            self._told = ""
        except Conflict as error:
            log.info("lease_taken", reason=str(error))
        except ApiAway as error:
            if str(error) != self._told:
                log.warning("lease_away", reason=str(error))
            self._told = str(error)

    async def _give_up(self) -> None:
        """Say that nobody holds it, so that the next need not wait; nothing is lost if that fails."""
        with contextlib.suppress(Conflict, ApiAway):
            await asyncio.to_thread(self._store.write, "", self._candidate.seen)
        self._candidate = LeaseCandidate(self._candidate.me, self._terms)


async def _first(*waits: Awaitable[object]) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
