"""Delivery of usage records into the database, and acknowledgements to the workers that offered records.

A record is appended to the spool on local disk, and moved from the spool into the database. The worker's copy is
acknowledged only after the database has committed. So a record is lost only if the gateway's disk *and* the worker are
lost.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from cluster.gateway.links.worker_link import WorkerLink
from cluster.ledger.errors import StoreUnavailable
from cluster.ledger.usage.records import UsageRecord
from cluster.ledger.usage.spool import Replayer, Spool, SpoolStatistics

log = structlog.get_logger("ledger")

LAST_MOVE_S = 5.0
MAX_ACKS = 64
"""Largest number of reports of one record that wait for the database. A worker repeats a report without an
acknowledgement."""
Insert = Callable[[Sequence[UsageRecord]], int | None]
"""Function that writes records to the database and returns the number of conflicts, as UsageTable.insert does. Raises
StoreUnavailable while the database is unavailable."""


class RecordDelivery:
    """The usage records that are not in the database yet, and the acknowledgements that workers get once the records
    are in the database."""

    def __init__(self, folder: Path, insert: Insert) -> None:
        """`folder`: the folder of the spool."""
        self._folder = folder
        self._insert = insert
        self._acks: dict[str, list[tuple[WorkerLink, int]]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._spool: Spool | None = None
        self._replayer: Replayer | None = None
        self.conflicts = 0
        """Number of records that were dropped because a row of another tenant has their id."""

    def start(self) -> None:
        """Open the spool and start moving records into the database. Raises ValueError if another process uses the
        folder."""
        self._loop = asyncio.get_running_loop()
        self._spool = Spool(self._folder)
        self._replayer = Replayer(self._spool, self._move)
        self._replayer.start()

    async def stop(self) -> None:
        """Move as many records as possible into the database, and close the spool."""
        spool, replayer = self._spool, self._replayer
        if spool is None or replayer is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_MOVE_S):
                await asyncio.to_thread(_last_move, spool, replayer)
        await asyncio.sleep(0)  # lets the scheduled acknowledgements run
        self._loop = None
        await asyncio.to_thread(spool.close)

    def statistics(self) -> SpoolStatistics:
        """Return the statistics of the records that wait for the database."""
        return SpoolStatistics(0, 0, 0, 0, None, "") if self._spool is None else self._spool.statistics()

    def acknowledge_later(self, record_id: str, link: WorkerLink, key: int) -> None:
        """Acknowledge the worker's report with the key `key` once the record is in the database."""
        waiting = self._acks.setdefault(record_id, [])
        if len(waiting) < MAX_ACKS:
            waiting.append((link, key))

    def write(self, record: UsageRecord) -> None:
        """Append a record to the spool, without waiting for the disk."""
        try:
            if self._spool is None:
                raise ValueError("the spool is not open")
            self._spool.append(record)
        except ValueError:  # the spool is closed; the worker will offer the unacknowledged usage elsewhere
            log.warning("usage.record_late", record=record.record_id)

    def _move(self, records: Sequence[UsageRecord]) -> None:
        """Insert records into the database. Called in the thread that empties the spool."""
        try:
            self.conflicts += self._insert(records) or 0
        except StoreUnavailable:
            raise
        except Exception:  # the database rejects a record
            if len(records) == 1:  # rejected for good: the spool sets it aside, and the worker need not offer it
                self._schedule_acks(records)
            raise
        self._schedule_acks(records)

    def _schedule_acks(self, records: Sequence[UsageRecord]) -> None:
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has just been closed
                loop.call_soon_threadsafe(self._acknowledge, [record.record_id for record in records])

    def _acknowledge(self, record_ids: Sequence[str]) -> None:
        """Acknowledge records to the workers that offered them. A worker may then forget these records."""
        keys: dict[WorkerLink, list[int]] = {}
        for record_id in record_ids:
            for link, key in self._acks.pop(record_id, ()):
                keys.setdefault(link, []).append(key)
        for link, link_keys in keys.items():
            link.box.usage_acks(link_keys)


def _last_move(spool: Spool, replayer: Replayer) -> None:
    replayer.stop()
    with contextlib.suppress(StoreUnavailable, OSError):
        spool.wait_durable(spool.statistics().written, 1.0)
        replayer.replay()
