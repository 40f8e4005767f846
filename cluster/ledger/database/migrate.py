"""Bringing a database's tables to what this release needs: first expand, then contract.

Two releases run side by side while a cluster is upgraded, on one database. So a migration either only adds (`expand`:
the release before still works) or only takes away what no supported release uses any more (`contract`), and says
which. `upgrade` stops before the first contraction unless it is asked for; `schema_history` keeps what was applied,
so that a release that meets a newer database can tell whether it was only expanded, and then goes on working.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, insert, inspect, select, text

from cluster.ledger.database.connect import reading, told_apart, where, writing
from cluster.ledger.database.tables import metadata, schema_history
from cluster.ledger.errors import StoreUnavailable

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import Script

# Alembic is imported where it is used: a gateway's start waits for nothing that it does.
FOLDER = Path(__file__).parent / "migrations"
REVISION_TABLE = "schema_revision"
_LOCK = 0x4845_4144  # one number that all of ours agree on: PostgreSQL's advisory lock of migrations


class State(enum.StrEnum):
    """How a database's tables stand to this release."""

    CURRENT = "current"
    EMPTY = "empty"
    BEHIND = "behind"
    TO_CONTRACT = "to_contract"
    AHEAD = "ahead"
    TOO_NEW = "too_new"
    DRIFTED = "drifted"


USABLE = frozenset({State.CURRENT, State.TO_CONTRACT, State.AHEAD})


@dataclass(frozen=True, slots=True)
class Check:
    """What `check` found. `database` and `release` are migration numbers, 0 for none; `pending` what upgrade does."""

    state: State
    database: int
    release: int
    pending: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether this release can work on the database as it is."""
        return self.state in USABLE

    def message(self) -> str:
        """One line for people, with the remedy."""
        numbers = f"the database is at migration {self.database}, this release at {self.release}"
        return {
            State.CURRENT: f"current: {numbers}",
            State.EMPTY: "empty: no tables yet; run `headrace db upgrade` with the same -f or --database-url",
            State.BEHIND: f"behind: {numbers}; run `headrace db upgrade` with the same -f or --database-url",
            State.TO_CONTRACT: f"usable: {numbers}; once no older release runs: `headrace db upgrade --contract`",
            State.AHEAD: f"usable: {numbers}, and the newer migrations only add",
            State.TOO_NEW: f"too new: {numbers}, and a newer migration took something away; use the newer release",
            State.DRIFTED: f"drifted: {numbers}, but the tables differ: {'; '.join(self.differences)}",
        }[self.state]


@dataclass(frozen=True, slots=True)
class Migrations:
    """The migrations of a release, oldest first. `folders` beyond the package's own are for tests of the rules."""

    folders: tuple[Path, ...] = (FOLDER / "versions",)

    def config(self, connection: Connection | None = None) -> Config:
        """Alembic's settings, without a file."""
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(FOLDER))
        config.set_main_option("path_separator", "newline")
        config.set_main_option("version_locations", "\n".join(map(str, self.folders)))
        config.attributes["connection"] = connection
        return config

    def scripts(self) -> Sequence[Script]:
        """Oldest first."""
        from alembic.script import ScriptDirectory

        return list(ScriptDirectory.from_config(self.config()).walk_revisions())[::-1]


def number_of(revision: str | None) -> int:
    """`r0007` -> 7; None, which is no tables at all, -> 0."""
    return int(revision[1:]) if revision else 0


def kind_of(script: Script) -> str:
    """`expand` or `contract`, as the migration says itself."""
    return str(getattr(script.module, "KIND", ""))


def _revision(connection: Connection) -> str | None:
    from alembic.migration import MigrationContext

    return MigrationContext.configure(connection, opts={"version_table": REVISION_TABLE}).get_current_revision()


def check(engine: Engine, migrations: Migrations | None = None) -> Check:
    """Compare the database's tables with those of this release. Raises StoreUnavailable when it does not answer."""
    scripts = (migrations or Migrations()).scripts()
    release = number_of(scripts[-1].revision)
    with reading(engine) as connection:
        database = number_of(_revision(connection))
        if not database:
            return Check(State.EMPTY, 0, release, tuple(s.revision for s in scripts))
        if database > release:
            newer = select(schema_history.c.kind).where(schema_history.c.number > release)
            taken_away = "contract" in connection.scalars(newer).all()
            return Check(State.TOO_NEW if taken_away else State.AHEAD, database, release)
        pending = [script for script in scripts if number_of(script.revision) > database]
        if pending:
            contracting = all(kind_of(script) == "contract" for script in pending)
            names = tuple(script.revision for script in pending)
            return Check(State.TO_CONTRACT if contracting else State.BEHIND, database, release, names)
        differences = tuple(_differences(connection))
    return Check(State.DRIFTED if differences else State.CURRENT, database, release, (), differences)


def _differences(connection: Connection) -> list[str]:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    def of_ours(_name: str | None, kind: str, _parents: object) -> bool:
        return kind != "table" or _name != REVISION_TABLE

    context = MigrationContext.configure(connection, opts={"version_table": REVISION_TABLE, "include_name": of_ours})
    return [str(one[0] if isinstance(one, list) else one) for one in compare_metadata(context, metadata)]


def upgrade(engine: Engine, *, contract: bool = False, migrations: Migrations | None = None) -> tuple[str, ...]:
    """Apply what is pending, one transaction in all, one process at a time. Returns the revisions applied.

    Without `contract` it stops before the first migration that takes something away.
    """
    from alembic import command

    scripts = (migrations or Migrations()).scripts()
    with told_apart(engine), writing(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        database = number_of(_revision(connection))
        applied = []
        for script in scripts:
            if number_of(script.revision) <= database:
                continue
            if kind_of(script) == "contract" and not contract:
                break
            command.upgrade((migrations or Migrations()).config(connection), script.revision)
            row = {"number": number_of(script.revision), "kind": kind_of(script), "applied_at": time.time()}
            connection.execute(insert(schema_history).values(row))
            applied.append(script.revision)
    return tuple(applied)


def require_usable(engine: Engine) -> None:
    """Raises StoreUnavailable with the remedy when this release cannot work on the database as it is."""
    found = check(engine)
    if not found.usable:
        raise StoreUnavailable(f"the database {where(engine)} is {found.message()}")


def table_names(engine: Engine) -> list[str]:
    """The tables that are there."""
    with told_apart(engine):
        return inspect(engine).get_table_names()
