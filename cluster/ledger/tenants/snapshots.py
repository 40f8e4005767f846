"""Incremental reader of access snapshots: the tenants and keys of the database at one time, read in one transaction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Engine, Row, select

from cluster.ledger.database.connect import reading
from cluster.ledger.database.tables import change_sequence, keys, tenants
from cluster.policy.tenants.identity import AccessSnapshot, KeyEntry, TenantEntry
from cluster.policy.tenants.policy import TenantPolicy


class Snapshots:
    """Reader of access snapshots, which contain all tenants and keys."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock

    def read(self, before: AccessSnapshot | None = None) -> AccessSnapshot:
        """Return the newest snapshot. Raises StoreUnavailable.

        `before`: an earlier snapshot; only the rows that were changed after it are read, or all rows if rows were
        deleted since. If no row was changed, the result has the same maps as `before` and a new `taken_at_s`.
        """
        taken_at_s = self._clock()  # before the read, so that the snapshot is at least as recent as taken_at_s
        with reading(self._engine) as connection:
            sequence, reload_from = connection.execute(
                select(change_sequence.c.value, change_sequence.c.reload_from)
            ).one()
            if before is not None and before.sequence == sequence:
                return replace(before, taken_at_s=taken_at_s)
            full = before is None or not reload_from <= before.sequence < sequence
            known = AccessSnapshot() if full or before is None else before
            after = -1 if full else known.sequence
            return AccessSnapshot(
                sequence, taken_at_s, _tenants(connection, dict(known.tenants), after), _keys(connection, known, after)
            )


def _tenants(connection: Connection, entries: dict[str, TenantEntry], after: int) -> dict[str, TenantEntry]:
    for row in connection.execute(select(tenants).where(tenants.c.changed > after)):
        if row.removed_at is None:
            entries[row.name] = TenantEntry(TenantPolicy.from_json(row.policy), row.origin, dict(row.model_aliases))
        else:
            entries.pop(row.name, None)
    return entries


def _keys(connection: Connection, known: AccessSnapshot, after: int) -> dict[bytes, KeyEntry]:
    entries = dict(known.keys)
    for row in connection.execute(select(keys).where(keys.c.changed > after)):
        entries[bytes.fromhex(row.digest)] = _entry(row)
    return entries


def _entry(row: Row[Any]) -> KeyEntry:
    expires_at_s = math.inf if row.expires_at is None else row.expires_at
    digest = bytes.fromhex(row.digest)
    return KeyEntry(row.id, row.tenant, digest, row.name, row.role, expires_at_s, row.revoked_at is not None)
