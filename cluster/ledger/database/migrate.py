"""Migrate a database's tables to this release: first expand, then contract.

During an upgrade two releases use the same database. So every migration declares a kind. A migration of kind `expand`
only adds, so the previous release still works. A migration of kind `contract` only removes what no supported release
uses. `upgrade` applies `contract` migrations only if the argument `contract` is set. Without this argument, `upgrade`
stops before the first `contract` migration. The table `schema_history` records the applied migrations. An older release
continues to work if this table shows that newer releases have only expanded the database.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, insert, inspect, select, text

from cluster.ledger.database.connect import reading, translate_errors, url_of, writing
from cluster.ledger.database.tables import metadata, schema_history
from cluster.ledger.errors import StoreUnavailable

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import Script

# Alembic is imported locally: a gateway must not wait for the import when it starts.
FOLDER = Path(__file__).parent / "migrations"
REVISION_TABLE = "schema_revision"
_LOCK = 0x4845_4144  # key of the PostgreSQL advisory lock that serializes migrations


class SchemaState(enum.StrEnum):
    """State of a database's tables relative to this release."""

    CURRENT = "current"
    EMPTY = "empty"
    BEHIND = "behind"
    TO_CONTRACT = "to_contract"
    AHEAD = "ahead"
    TOO_NEW = "too_new"
    DRIFTED = "drifted"


USABLE = frozenset({SchemaState.CURRENT, SchemaState.TO_CONTRACT, SchemaState.AHEAD})


@dataclass(frozen=True, slots=True)
class Check:
    """The state of a database's migrations, as `check` returns it.

    `database`: number of the newest migration of the database; 0 if there is none. `release`: number of the
    newest migration of this release. `pending`: revisions that must still be applied.
    """

    state: SchemaState
    database: int
    release: int
    pending: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """True if this release can work on the database without a migration."""
        return self.state in USABLE

    def message(self) -> str:
        """Return the state in one line, with the remedy."""
        numbers = f"the database is at migration {self.database}, this release at {self.release}"
        return {
            SchemaState.CURRENT: f"current: {numbers}",
            SchemaState.EMPTY: "empty: no tables yet; run `headrace db upgrade` with the same -f or --database-url",
            SchemaState.BEHIND: f"behind: {numbers}; run `headrace db upgrade` with the same -f or --database-url",
            SchemaState.TO_CONTRACT: f"usable: {numbers}; once no older release runs: `headrace db upgrade --contract`",
            SchemaState.AHEAD: f"usable: {numbers}, and the newer migrations only add",
            SchemaState.TOO_NEW: f"too new: {numbers}, and a newer migration removed something; use the newer release",
            SchemaState.DRIFTED: f"drifted: {numbers}, but the tables differ: {'; '.join(self.differences)}",
        }[self.state]


@dataclass(frozen=True, slots=True)
class Migrations:
    """The migrations of a release, oldest first. Tests pass additional `folders`."""

    folders: tuple[Path, ...] = (FOLDER / "versions",)

    def config(self, connection: Connection | None = None) -> Config:
        """Return a configuration for Alembic. The configuration is built without a file."""
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(FOLDER))
        config.set_main_option("path_separator", "newline")
        config.set_main_option("version_locations", "\n".join(map(str, self.folders)))
        config.attributes["connection"] = connection
        return config

    def scripts(self) -> Sequence[Script]:
        """Return the migration scripts, oldest first."""
        from alembic.script import ScriptDirectory

        return list(ScriptDirectory.from_config(self.config()).walk_revisions())[::-1]


def migration_number(revision: str | None) -> int:
    """Return the number of a revision: 7 for `r0007`, 0 for None (a database without tables)."""
    return int(revision[1:]) if revision else 0


def migration_kind(script: Script) -> str:
    """Return the KIND of a migration, `expand` or `contract`."""
    return str(getattr(script.module, "KIND", ""))


def _revision(connection: Connection) -> str | None:
    from alembic.migration import MigrationContext

    return MigrationContext.configure(connection, opts={"version_table": REVISION_TABLE}).get_current_revision()


def check(engine: Engine, migrations: Migrations | None = None) -> Check:
    """Compare the database's tables with the tables of this release.

    Raises StoreUnavailable if the database does not answer.
    """
    scripts = (migrations or Migrations()).scripts()
    release = migration_number(scripts[-1].revision)
    with reading(engine) as connection:
        database = migration_number(_revision(connection))
        if not database:
            return Check(SchemaState.EMPTY, 0, release, tuple(s.revision for s in scripts))
        if database > release:
            newer = select(schema_history.c.kind).where(schema_history.c.number > release)
            contracted = "contract" in connection.scalars(newer).all()
            return Check(SchemaState.TOO_NEW if contracted else SchemaState.AHEAD, database, release)
        pending = [script for script in scripts if migration_number(script.revision) > database]
        if pending:
            only_contracts = all(migration_kind(script) == "contract" for script in pending)
            names = tuple(script.revision for script in pending)
            return Check(SchemaState.TO_CONTRACT if only_contracts else SchemaState.BEHIND, database, release, names)
        differences = tuple(_differences(connection))
    return Check(SchemaState.DRIFTED if differences else SchemaState.CURRENT, database, release, (), differences)


def _differences(connection: Connection) -> list[str]:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    def is_own_table(_name: str | None, kind: str, _parents: object) -> bool:
        return kind != "table" or _name != REVISION_TABLE

    context = MigrationContext.configure(
        connection, opts={"version_table": REVISION_TABLE, "include_name": is_own_table}
    )
    return [str(change[0] if isinstance(change, list) else change) for change in compare_metadata(context, metadata)]


def upgrade(engine: Engine, *, contract: bool = False, migrations: Migrations | None = None) -> tuple[str, ...]:
    """Apply pending migrations in one transaction. Returns the applied revisions.

    Only one process at a time applies migrations. If `contract` is False, the function stops before the first
    migration of kind `contract`.
    """
    from alembic import command

    scripts = (migrations or Migrations()).scripts()
    with translate_errors(engine), writing(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        database = migration_number(_revision(connection))
        applied = []
        for script in scripts:
            if migration_number(script.revision) <= database:
                continue
            if migration_kind(script) == "contract" and not contract:
                break
            command.upgrade((migrations or Migrations()).config(connection), script.revision)
            row = {
                "number": migration_number(script.revision),
                "kind": migration_kind(script),
                "applied_at": time.time(),
            }
            connection.execute(insert(schema_history).values(row))
            applied.append(script.revision)
    return tuple(applied)


def require_usable(engine: Engine) -> None:
    """Raise StoreUnavailable with the remedy if this release cannot work on the database without a migration."""
    result = check(engine)
    if not result.usable:
        raise StoreUnavailable(f"the database {url_of(engine)} is {result.message()}")


def table_names(engine: Engine) -> list[str]:
    """Return the names of the database's tables."""
    with translate_errors(engine):
        return inspect(engine).get_table_names()
