"""Migrations create the same tables as the code declares. A release recognizes the databases that it can use."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import MetaData, Table, inspect, text

from cluster.ledger.database import migrate
from cluster.ledger.database.changes import dialect_insert
from cluster.ledger.database.connect import make_engine, parse_url
from cluster.ledger.errors import StoreUnavailable
from cluster.ledger.rows import UsageQuery
from cluster.ledger.store import Ledger
from cluster.ledger.usage.records import UsageRecord
from tests.ledger.samples import record

pytestmark = pytest.mark.slow

EXPAND = """
import sqlalchemy as sa
from alembic import op
revision, down_revision, branch_labels, depends_on, KIND = "r{n}", "r{before}", None, None, "expand"
def upgrade():
    op.add_column("tenants", sa.Column("extra", sa.Text))
"""
CONTRACT = """
from alembic import op
revision, down_revision, branch_labels, depends_on, KIND = "r{n}", "r{before}", None, None, "contract"
def upgrade():
    op.drop_column("tenants", "model_aliases")
"""


def newer(folder: Path, *kinds: str) -> migrate.Migrations:
    """Return the migrations of a later release: this release's, and further migrations of the given kinds."""
    last = migrate.migration_number(migrate.Migrations().scripts()[-1].revision)
    for at, kind in enumerate(kinds, start=last + 1):
        source = (EXPAND if kind == "expand" else CONTRACT).format(n=f"{at:04}", before=f"{at - 1:04}")
        (folder / f"r{at:04}_x.py").write_text(source)
    return migrate.Migrations((migrate.FOLDER / "versions", folder))


def test_migrations_make_what_the_tables_say(database_url: str) -> None:
    """An upgrade changes the state of a database from EMPTY to CURRENT. A second upgrade applies nothing."""
    engine = make_engine(database_url)
    assert migrate.check(engine).state is migrate.SchemaState.EMPTY
    with pytest.raises(StoreUnavailable, match="db upgrade"):
        migrate.require_usable(engine)
    assert migrate.upgrade(engine)
    assert migrate.upgrade(engine) == ()
    check = migrate.check(engine)
    assert (check.state, check.differences) == (migrate.SchemaState.CURRENT, ())
    migrate.require_usable(engine)
    engine.dispose()


def test_a_drifted_table_is_told(database_url: str) -> None:
    """`check` names a column that is missing because it was dropped by hand."""
    engine = make_engine(database_url)
    migrate.upgrade(engine)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE tenants DROP COLUMN updated_at"))
    check = migrate.check(engine)
    assert check.state is migrate.SchemaState.DRIFTED
    assert "updated_at" in check.message()
    engine.dispose()


def test_expand_now_contract_when_asked(database_url: str, tmp_path: Path) -> None:
    """An upgrade applies migrations of the kind `expand` and stops before one of the kind `contract`.

    The previous release can work on the database until the `contract` migration is applied, which must be requested
    explicitly.
    """
    engine = make_engine(database_url)
    migrate.upgrade(engine)
    ahead = newer(tmp_path, "expand", "contract")
    expand, contract = (script.revision for script in ahead.scripts()[-2:])
    assert migrate.check(engine, ahead).state is migrate.SchemaState.BEHIND
    assert migrate.upgrade(engine, migrations=ahead) == (expand,)
    assert migrate.check(engine, ahead).state is migrate.SchemaState.TO_CONTRACT
    old = migrate.check(engine)
    assert (old.state, old.usable) == (migrate.SchemaState.AHEAD, True)
    assert migrate.upgrade(engine, contract=True, migrations=ahead) == (contract,)
    old = migrate.check(engine)
    assert (old.state, old.usable) == (migrate.SchemaState.TOO_NEW, False)
    assert "newer release" in old.message()
    engine.dispose()


def test_gateways_that_start_together_upgrade_once(database_url: str) -> None:
    """Of four concurrent upgrades, one applies all migrations and the others apply nothing."""
    applied: list[tuple[str, ...]] = []

    def start() -> None:
        ledger = Ledger(database_url)
        applied.append(ledger.upgrade())
        ledger.close()

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(len, applied)) == [0, 0, 0, len(migrate.Migrations().scripts())]


def test_a_new_file_is_opened_while_another_writes(tmp_path: Path) -> None:
    """A new SQLite file can be opened while another connection writes, because the switch to WAL is retried.

    Without retries the switch fails immediately with "locked".
    """
    file = tmp_path / "ledger.db"
    other = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE theirs (a)")
    other.execute("BEGIN IMMEDIATE")
    done = threading.Timer(0.2, lambda: other.execute("COMMIT"))
    done.start()
    engine = make_engine(f"sqlite:///{file}")
    assert migrate.table_names(engine) == ["theirs"]
    engine.dispose()
    done.join()
    other.close()


def test_a_failed_migration_leaves_nothing(database_url: str, tmp_path: Path) -> None:
    """The whole upgrade is rolled back if one migration fails."""
    ahead = newer(tmp_path, "expand")
    last = migrate.migration_number(migrate.Migrations().scripts()[-1].revision)
    source = EXPAND.format(n=f"{last + 1:04}", before=f"{last:04}")
    (tmp_path / f"r{last + 1:04}_x.py").write_text(source + "    raise ValueError('boom')\n")
    engine = make_engine(database_url)
    with pytest.raises(ValueError, match="boom"):
        migrate.upgrade(engine, migrations=ahead)
    assert migrate.check(engine).state is migrate.SchemaState.EMPTY
    assert migrate.table_names(engine) == []
    engine.dispose()


def test_each_migration_does_what_its_kind_says(database_url: str) -> None:
    """A migration of kind `expand` removes no table and no column. Every column that it adds is nullable or has a
    default."""
    engine = make_engine(database_url)
    before: dict[str, set[str]] = {}
    for script in migrate.Migrations().scripts():
        kind = migrate.migration_kind(script)
        assert kind in ("expand", "contract"), f"{script.revision} has no KIND"
        with engine.begin() as connection:
            command.upgrade(migrate.Migrations().config(connection), script.revision)
        view = inspect(engine)
        columns = {table: {c["name"]: c for c in view.get_columns(table)} for table in view.get_table_names()}
        for table, names in before.items():
            if kind == "expand":
                assert names <= columns.get(table, {}).keys(), (
                    f"{script.revision} is `expand` and removes columns of {table}"
                )
                for name in columns[table].keys() - names:
                    column = columns[table][name]
                    assert column["nullable"] or column["default"] is not None, f"{script.revision}: {table}.{name}"
        before = {table: set(names) for table, names in columns.items()}
    engine.dispose()


def test_the_previous_release_goes_on_inserting_usage(database_url: str) -> None:
    """After the migrations for reasoning tokens, predictions and traces, the INSERT of the previous release still
    works.

    Rows that existed before have no reasoning tokens, predictions or traces. A row holds an estimate until a
    release replaces the estimate by the real count. Whichever release does this, the row never has more reasoning
    tokens than completion tokens.
    """
    ledger = Ledger(database_url)
    engine = make_engine(database_url)
    with engine.begin() as connection:
        command.upgrade(migrate.Migrations().config(connection), "r0004")
    previous = Table("usage", MetaData(), autoload_with=engine)
    assert "reasoning_tokens" not in previous.c

    def insert(*records: UsageRecord) -> None:
        rows = [{**record.as_json(), "day": record.day} for record in records]
        with engine.begin() as connection:
            statement = dialect_insert(connection, previous)
            values = {c.name: statement.excluded[c.name] for c in previous.c if c.name != "record_id"}
            better = previous.c.delivered_unknown & ~statement.excluded.delivered_unknown
            statement = statement.on_conflict_do_update(index_elements=["record_id"], set_=values, where=better)
            connection.execute(statement, [{c.name: row[c.name] for c in previous.c} for row in rows])

    insert(record("before"))
    with engine.begin() as connection:
        command.upgrade(migrate.Migrations().config(connection), "head")
    insert(record("after"), record("exact"))
    estimates = [record(name, delivered_unknown=True, reasoning_tokens=0) for name in ("exact", "estimate")]
    ledger.usage.insert([record("new", predicted_cached_tokens=3, trace_id="a" * 32), *estimates])
    insert(record("new", completion_tokens=1, reasoning_tokens=0))
    insert(record("estimate", completion_tokens=1, reasoning_tokens=0))
    found = {row.record_id: (row.completion_tokens, row.reasoning_tokens) for row in ledger.usage.records(UsageQuery())}
    predicted = {row.record_id: row.predicted_cached_tokens for row in ledger.usage.records(UsageQuery())}
    assert predicted == {**dict.fromkeys(found), "new": 3}
    traces = {row.record_id: row.trace_id for row in ledger.usage.records(UsageQuery())}
    assert traces == {**dict.fromkeys(found, ""), "new": "a" * 32}
    assert found == {"before": (5, 0), "after": (5, 0), "exact": (5, 0), "estimate": (1, 0), "new": (5, 2)}
    (sums,) = ledger.usage.query(UsageQuery(()))
    assert (sums["completion_tokens"], sums["reasoning_tokens"]) == (21, 2)
    ledger.close()
    engine.dispose()


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("nonsense", "is no URL"),
        ("mysql://host/db", "mysql is not served"),
        ("sqlite://", "in-memory"),
        ("sqlite:///:memory:", "in-memory"),
        ("sqlite:////no/such/folder/x.db", "does not exist"),
    ],
)
def test_urls_are_checked(url: str, word: str) -> None:
    """An invalid database URL raises an error that names the setting and the remedy."""
    with pytest.raises(ValueError, match=word):
        make_engine(url)


def test_the_password_comes_from_elsewhere() -> None:
    """A password that is given separately is put into the URL, and the repr of a ledger does not contain it."""
    url = parse_url("postgresql://headrace@db/x", "s3cret")
    assert (url.drivername, url.password) == ("postgresql+psycopg", "s3cret")
    assert "s3cret" not in repr(Ledger("postgresql://headrace@db/x", password="s3cret"))


def test_a_database_that_is_not_there(tmp_path: Path) -> None:
    """A closed port and a file that is not a database raise StoreUnavailable. The message contains no password."""
    with pytest.raises(StoreUnavailable, match="does not answer") as caught:
        Ledger("postgresql://u:s3cret@127.0.0.1:1/x").check()
    assert "s3cret" not in str(caught.value)
    (tmp_path / "x.db").write_bytes(b"not a database, and long enough to be looked at" * 50)
    with pytest.raises(StoreUnavailable, match="not a database"):
        Ledger(f"sqlite:///{tmp_path / 'x.db'}").check()
