"""The upkeep of the ledger's database by process 0 of a host: the schema, the configured tenants and expired rows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import structlog

from cluster.config.paths import database_url
from cluster.config.schema import Config
from cluster.ledger.database.bring_up import prepare_database, prepare_database_in_process
from cluster.ledger.errors import LedgerError
from cluster.ledger.store import Ledger
from cluster.policy.tenants.policy import TenantPolicy
from cluster.process import memory
from cluster.process.background import lower_priority, run_when_idle

log = structlog.get_logger("tenants")

SOON_S = 30.0
"""Time limit, in seconds, for a schema check at idle priority. After this time the check is started again at low
priority, which gets a core even on a busy machine."""
RETRY_S, MAX_RETRY_S = 5.0, 60.0
FIRST_EXPIRY_S, EXPIRY_S = 600.0, 86400.0


class LedgerUpkeep:
    """Maintenance of the ledger's database. First `prepare` migrates it and declares the configured tenants. Then
    `expire` deletes expired rows daily."""

    def __init__(self, config: Config, ledger: Ledger, declared: Sequence[TenantPolicy]) -> None:
        """`declared`: policies of the tenants in the configuration file."""
        self._url = database_url(config)
        self._days = config.store.retention_days
        self._ledger = ledger
        self._declared = declared

    @property
    def may_be_prepared(self) -> bool:
        """Whether an earlier run may have prepared the database. False only if the database is an SQLite file that does
        not exist."""
        return not self._url.startswith("sqlite:///") or Path(self._url.removeprefix("sqlite:///")).exists()

    async def prepare(self, tried: asyncio.Event, *, serving: bool) -> None:
        """Migrate the database and declare the configured tenants. Retries until both have succeeded.

        `serving`: whether calls already run; if so, the migration runs in a process of low priority. `tried`: the event
        that is set after a failed attempt.
        """
        retry_s = RETRY_S
        while True:
            try:
                if not serving:
                    await asyncio.to_thread(prepare_database, self._url)
                    memory.freeze_objects()  # because bring_up has imported the migration modules
                elif retry_s == RETRY_S:
                    await prepare_database_in_process(self._url, run_when_idle, SOON_S)
                else:  # the attempt at idle priority may have got no core on a busy machine
                    await prepare_database_in_process(self._url, lower_priority)
                await asyncio.to_thread(self._ledger.tenants.declare, self._declared)
                return
            except LedgerError as error:
                log.warning("ledger.not_ready", error=str(error))
                tried.set()
                await asyncio.sleep(retry_s)
                # Backs off while serving, where each attempt starts a process.
                retry_s = min(2 * retry_s, MAX_RETRY_S) if serving else RETRY_S

    async def expire(self) -> None:
        """Delete expired rows daily. Runs until cancelled."""
        wait_s = FIRST_EXPIRY_S
        while True:
            await asyncio.sleep(wait_s)
            wait_s = EXPIRY_S
            from cluster.ledger.database.retention import expire

            try:
                deleted = await asyncio.to_thread(
                    expire, self._ledger, time.time(), usage_days=self._days.usage, audit_days=self._days.audit
                )
                log.info("ledger.records_deleted", usage=deleted.usage, audit=deleted.audit)
            except LedgerError as error:
                log.warning("ledger.records_not_deleted", error=str(error))
            except Exception:  # the next day's deletion must still run
                log.exception("ledger.records_not_deleted")
