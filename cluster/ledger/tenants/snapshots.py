"""Incremental reader of access snapshots: the tenants and keys of the database at one time, read in one transaction."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import structlog
from sqlalchemy import Connection, Engine, Row, select

from cluster.ledger.database.connect import reading
from cluster.ledger.database.tables import change_sequence, keys, tenants
from cluster.policy.tenants.identity import AccessSnapshot, KeyEntry, TenantEntry
from cluster.policy.tenants.policy import PolicyError, TenantPolicy

log = structlog.get_logger("ledger")


class Snapshots:
    """Reader of access snapshots, which contain all tenants and keys."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock
        self._unusable: dict[str, str] = {}  # name of each tenant with an unusable row -> the error, logged already

    def read(self, before: AccessSnapshot | None = None) -> AccessSnapshot:
        """Return the newest snapshot. Raises StoreUnavailable.

        `before`: an earlier snapshot; only the rows that were changed after it are read, or all rows if rows were
        deleted since. A snapshot of another database is ignored. If no row was changed, the result has the same maps as
        `before` and a new `taken_at_s`.

        A tenant whose row cannot be used keeps its entry of `before`. Without such an entry the tenant is suspended.
        """
        taken_at_s = self._clock()  # before the read, so that the snapshot is at least as recent as taken_at_s
        with reading(self._engine) as connection:
            columns = change_sequence.c
            sequence, reload_from, database_id = connection.execute(
                select(columns.value, columns.reload_from, columns.database_id)
            ).one()
            if before is not None and before.database_id != database_id:
                before = None
            if before is not None and before.sequence == sequence:
                return replace(before, taken_at_s=taken_at_s)
            full = before is None or not reload_from <= before.sequence < sequence
            known = AccessSnapshot() if full or before is None else before
            after = -1 if full else known.sequence
            rows = connection.execute(select(tenants).where(tenants.c.changed > after)).all()
            entries = self._updated(known.tenants, rows, before or known)
            return AccessSnapshot(sequence, taken_at_s, entries, _keys(connection, known, after), database_id)

    def _updated(
        self, known: Mapping[str, TenantEntry], rows: Sequence[Row[Any]], before: AccessSnapshot
    ) -> dict[str, TenantEntry]:
        """Return the entries of `known`, updated by changed rows. One unusable row does not stop the others."""
        entries = dict(known)
        for row in rows:
            entry = None
            if row.removed_at is None:
                try:
                    entry = TenantEntry(TenantPolicy.from_stored(row.policy), row.origin, dict(row.model_aliases))
                    self._unusable.pop(row.name, None)
                except (TypeError, ValueError) as error:
                    entry = before.tenants.get(row.name) or _suspended(row)
                    self._log_unusable(row.name, str(error))
            if entry is None:
                entries.pop(row.name, None)
            else:
                entries[row.name] = entry
        return entries

    def _log_unusable(self, tenant: str, error: str) -> None:
        if self._unusable.get(tenant) != error:
            log.error("ledger.tenant_not_read", tenant=tenant, error=error)
        self._unusable[tenant] = error


def _suspended(row: Row[Any]) -> TenantEntry | None:
    """Return an entry that refuses all calls of a tenant with an unusable row; None if the name is invalid too."""
    try:
        return TenantEntry(TenantPolicy.suspended_in_place_of(row.name, row.policy), row.origin)
    except PolicyError:
        return None


def _keys(connection: Connection, known: AccessSnapshot, after: int) -> dict[bytes, KeyEntry]:
    entries = dict(known.keys)
    for row in connection.execute(select(keys).where(keys.c.changed > after)):
        entries[bytes.fromhex(row.digest)] = _entry(row)
    return entries


def _entry(row: Row[Any]) -> KeyEntry:
    expires_at_s = math.inf if row.expires_at is None else row.expires_at
    digest = bytes.fromhex(row.digest)
    return KeyEntry(row.id, row.tenant, digest, row.name, row.role, expires_at_s, row.revoked_at is not None)
