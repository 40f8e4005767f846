"""The audit table: the same events as in the JSON lines, searchable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Engine, delete, select

from cluster.ledger.audit.audit import AuditEvent
from cluster.ledger.database.changes import insert_or
from cluster.ledger.database.connect import reading, writing
from cluster.ledger.database.tables import audit


class Audits:
    """The table of audit events."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def insert(self, events: Sequence[AuditEvent]) -> None:
        """Add events; one that is there already is left as it is. Raises StoreUnavailable."""
        if not events:
            return
        with writing(self._engine) as connection:
            statement = insert_or(connection, audit).on_conflict_do_nothing(index_elements=["event_id"])
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
        """Newest first. `equal` holds columns to values; `before` is (at_s, event_id) of the last one of the page
        before."""
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
        """Remove events older than that, of one tenant or of all but some; how many."""
        old = delete(audit).where(audit.c.at_s < before_s)
        if tenant:
            old = old.where(audit.c.tenant == tenant)
        if except_tenants:
            old = old.where(audit.c.tenant.not_in(list(except_tenants)))
        with writing(self._engine) as connection:
            return connection.execute(old).rowcount
