"""The ledger: all operations on one database. The operations are synchronous, so event loops call them in a thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.ledger.audit.audit import AuditEvent, AuditLog
from cluster.ledger.audit.table import AuditTable
from cluster.ledger.database import migrate
from cluster.ledger.database.backup import Counts, backup, restore
from cluster.ledger.database.connect import make_engine, url_of
from cluster.ledger.tenants.keys import Keys
from cluster.ledger.tenants.snapshots import Snapshots
from cluster.ledger.tenants.tenants import Tenants
from cluster.ledger.usage.budget_notices import BudgetNotices
from cluster.ledger.usage.resumed_segments import ResumedSegments
from cluster.ledger.usage.slo import SloTable
from cluster.ledger.usage.usage import UsageTable
from cluster.process.user import user_name


class Ledger:
    """Tenants, keys, usage, audit events and access snapshots of one database.

    `peppers`: secrets with which API keys are hashed. New keys are hashed with the first pepper. Only methods of `keys`
    need peppers. `clock` returns seconds since the epoch.
    """

    def __init__(
        self,
        database_url: str,
        *,
        peppers: Sequence[bytes] = (),
        password: str | None = None,
        clock: Callable[[], float] = time.time,
        audit_file: Path | None = None,
    ) -> None:
        self._engine = make_engine(database_url, password)
        self.audit = AuditTable(self._engine)
        self.tenants = Tenants(self._engine, clock)
        self.keys = Keys(self._engine, clock, tuple(peppers))
        self.usage = UsageTable(self._engine)
        self.slo = SloTable(self._engine)
        self.notices = BudgetNotices(self._engine)
        self.resumed_segments = ResumedSegments(self._engine)
        self.snapshots = Snapshots(self._engine, clock)
        self._clock = clock
        self._log = AuditLog(audit_file) if audit_file else None

    def __repr__(self) -> str:
        return f"Ledger({url_of(self._engine)})"

    def close(self) -> None:
        """Close the database connections."""
        self._engine.dispose()

    def check(self) -> migrate.Check:
        """Compare the database's tables with the tables of this release. Raises StoreUnavailable."""
        return migrate.check(self._engine)

    def require_usable(self) -> None:
        """Raise StoreUnavailable with the remedy if this release cannot work on the database."""
        migrate.require_usable(self._engine)

    def upgrade(self, *, contract: bool = False) -> tuple[str, ...]:
        """Migrate the tables to this release. Returns the applied revisions."""
        return migrate.upgrade(self._engine, contract=contract)

    def backup(self, file: Path) -> Counts:
        """Write a consistent backup into one file. Returns the number of rows by table."""
        return backup(self._engine, file, self._clock())

    def restore(self, file: Path) -> Counts:
        """Restore a backup into an empty database, in one transaction. Returns the number of rows by table."""
        return restore(self._engine, file)

    def record(self, action: str, object_name: str, *, tenant: str = "", reason: str = "", actor: str = "") -> None:
        """Record an admin action in the audit table and, if there is an audit file, in that file too."""
        event = AuditEvent(
            at_s=self._clock(),
            kind="admin",
            action=action,
            actor=actor or f"cli:{user_name()}",
            tenant=tenant,
            object=object_name,
            reason=reason,
        )
        if self._log is not None:
            self._log.write(event)
        self.audit.insert([event])

    def erase(self, tenant: str) -> int:
        """Remove a tenant, the tenant's keys and every row that names the tenant. Returns the number of rows removed.

        Raises NotFound, ManagedByFile.
        """
        return self.tenants.erase(tenant)
