"""The audit table: the events of the audit file, stored in the database for queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Engine, delete, select

from cluster.ledger.audit.audit import AuditEvent
from cluster.ledger.database.changes import dialect_insert
from cluster.ledger.database.connect import reading, writing
from cluster.ledger.database.tables import audit


class AuditTable:
    """The table of audit events."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def insert(self, events: Sequence[AuditEvent]) -> None:
        """Insert events. Events that are already stored stay unchanged. Raises StoreUnavailable."""
        if not events:
            return
        with writing(self._engine) as connection:
            statement = dialect_insert(connection, audit).on_conflict_do_nothing(index_elements=["event_id"])
            connection.execute(statement, [event.as_json() for event in events])

    def list(
        self,
        *,
        tenant: str = "",
        kind: str = "",
        since_s: float = 0.0,
        equal: Mapping[str, str] | None = None,
        before: tuple[float, str] | None = None,
        limit: int = 100,
    ) -> list[dict[str, Any]]:
        """Return a page of the events since `since_s` (seconds since the epoch), newest first.

        `equal` maps columns to required values. `before` is the (at_s, event_id) of the previous page's last event.
        """
        query = select(audit).where(audit.c.at_s >= since_s)
        if tenant:
            query = query.where(audit.c.tenant == tenant)
        if kind:
            query = query.where(audit.c.kind == kind)
        for name, value in (equal or {}).items():
            query = query.where(audit.c[name] == value)
        if before is not None:
            at_s, event_id = before
            query = query.where((audit.c.at_s < at_s) | ((audit.c.at_s == at_s) & (audit.c.event_id < event_id)))
        query = query.order_by(audit.c.at_s.desc(), audit.c.event_id.desc()).limit(limit)
        with reading(self._engine) as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def expire(self, before_s: float, *, tenant: str = "", except_tenants: Sequence[str] = ()) -> int:
        """Remove events recorded before `before_s` (seconds since the epoch). Returns the number of events removed.

        `tenant` limits the removal to one tenant; "" means all tenants. Events of `except_tenants` stay.
        """
        old = delete(audit).where(audit.c.at_s < before_s)
        if tenant:
            old = old.where(audit.c.tenant == tenant)
        if except_tenants:
            old = old.where(audit.c.tenant.not_in(list(except_tenants)))
        with writing(self._engine) as connection:
            return connection.execute(old).rowcount
