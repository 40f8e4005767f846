"""Backups are consistent and portable between SQLite and PostgreSQL. A restore is complete or changes nothing."""

from __future__ import annotations

import gzip
import itertools
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from cluster.ledger.audit.audit import AuditEvent
from cluster.ledger.database.backup import BATCH_ROWS, TABLES, verify
from cluster.ledger.database.connect import make_engine
from cluster.ledger.database.tables import usage
from cluster.ledger.errors import LedgerError
from cluster.ledger.rows import UsageQuery
from cluster.ledger.store import Ledger
from cluster.policy.limits.budgets import BudgetUse, crossed
from cluster.policy.tenants.identity import authenticate
from cluster.policy.tenants.policy import TenantPolicy
from tests.ledger.conftest import PEPPER
from tests.ledger.samples import record
from tests.support.cpu import cpu_within

pytestmark = pytest.mark.slow


def fill(ledger: Ledger) -> str:
    """Write rows into every table. Returns an API key."""
    ledger.tenants.create(TenantPolicy("acme", labels={"ü": "x"}), model_aliases={"a": "b"})
    ledger.tenants.create(TenantPolicy("gone"))
    ledger.erase("gone")
    ledger.usage.insert([record(f"r{at}", ttft_s=None if at % 2 else 0.1) for at in range(7)])
    ledger.audit.insert([AuditEvent(1.0, "admin", "x", reason="because\nof ü", details={"n": 1})])
    ledger.notices.insert_new(crossed([BudgetUse("acme", "daily_tokens", "1970-01-02", 8, 10)], [0.8]), 1.0)
    return ledger.keys.create("acme", "ci").secret


def content(database_url: str) -> dict[str, list[Any]]:
    """Return all rows of a database, by table."""
    engine = make_engine(database_url)
    with engine.connect() as connection:
        rows = {t.name: sorted(map(repr, connection.execute(select(t)))) for t in TABLES}
    engine.dispose()
    return rows


@pytest.fixture
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """Factory of empty databases. The factory takes `sqlite` or `postgresql` and returns the URL of a new database."""
    numbers = itertools.count()

    def make(kind: str) -> str:
        if kind == "sqlite":
            return f"sqlite:///{tmp_path / f'empty{next(numbers)}.db'}"
        return str(request.getfixturevalue("server").new_database())

    return make


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_backup_moves_between_databases(
    ledger: Ledger, database_url: str, tmp_path: Path, empty: Callable[[str], str], kind: str
) -> None:
    """A restored database has the rows of the backup, and the keys in it are valid.

    The change sequence, which numbers changes, continues above the numbers of the old database.
    """
    key = fill(ledger)
    counts = ledger.backup(tmp_path / "b.gz")
    assert dict(counts) == {"tenants": 1, "keys": 1, "usage": 7, "audit": 1, "erased_tenants": 1, "budget_notices": 1}
    assert (tmp_path / "b.gz").stat().st_mode & 0o077 == 0
    url = empty(kind)
    copy = Ledger(url, peppers=(PEPPER,))
    assert copy.restore(tmp_path / "b.gz") == counts
    assert content(url) == content(database_url)
    restored = copy.snapshots.read(ledger.snapshots.read())
    assert authenticate(restored, key, (PEPPER,), 0).reason == "ok"
    copy.tenants.suspend("acme")
    assert authenticate(copy.snapshots.read(restored), key, (PEPPER,), 0).reason == "suspended"
    with pytest.raises(LedgerError, match="not empty"):
        copy.restore(tmp_path / "b.gz")
    copy.close()


def test_a_damaged_backup_changes_nothing(tmp_path: Path, empty: Callable[[str], str]) -> None:
    """Restoring a truncated, changed or foreign file raises LedgerError before the first row is written."""
    ledger = Ledger(empty("sqlite"), peppers=(PEPPER,))
    ledger.upgrade()
    fill(ledger)
    good = tmp_path / "good.gz"
    ledger.backup(good)
    text = gzip.decompress(good.read_bytes())
    tail = json.loads(text.splitlines()[-1])
    cases = {
        "cut": good.read_bytes()[:-20],
        "lines": gzip.compress(b"".join(text.splitlines(keepends=True)[:-3])),
        "changed": gzip.compress(text.replace(b'"acme"', b'"evil"')),
        "foreign": b"hello",
        "empty": b"",
        "no tail": gzip.compress(json.dumps({**tail, "sha256": 1}).encode()),
    }
    for name, data in cases.items():
        bad = tmp_path / "bad.gz"
        bad.write_bytes(data)
        copy = Ledger(empty("sqlite"))
        copy.upgrade()
        with pytest.raises(LedgerError, match=r"bad\.gz"):
            copy.restore(bad)
        assert copy.tenants.list() == [], name
        copy.close()
    ledger.close()
    with pytest.raises(FileNotFoundError):
        verify(tmp_path / "nothing.gz")


def test_nothing_to_back_up(tmp_path: Path, empty: Callable[[str], str]) -> None:
    """A backup of a database without tables raises LedgerError and leaves no file."""
    with pytest.raises(LedgerError, match="nothing to back up"):
        Ledger(empty("sqlite")).backup(tmp_path / "b.gz")
    assert list(tmp_path.glob("*.gz*")) == []


def _with_records(file: Path, count: int) -> Ledger:
    """Return a new ledger with `count` usage records of a hundred tenants."""
    source = Ledger(f"sqlite:///{file}")
    source.upgrade()
    source.usage.insert([record("r")])
    columns = [column.name for column in usage.columns if column.name not in ("record_id", "tenant", "day")]
    with sqlite3.connect(file) as connection:
        connection.execute(
            f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count - 1}) "  # noqa: S608
            f"INSERT INTO usage (record_id, tenant, day, {', '.join(columns)}) "
            "SELECT 'r' || i, 't' || (i % 100), printf('2026-11-%02d', i % 28 + 1), "
            f"{', '.join('usage.' + name for name in columns)} FROM n, usage"
        )
    connection.close()
    return source


@pytest.mark.long
def test_a_million_records(tmp_path: Path) -> None:
    """A million records are summed in less than 30 s."""
    source = _with_records(tmp_path / "a.db", 1_000_000)
    with cpu_within(30.0):
        sums = source.usage.query(UsageQuery(("tenant", "day")))
    assert sum(row["requests"] for row in sums) == 1_000_000
    source.close()


@pytest.mark.slow
def test_a_backup_of_many_batches(tmp_path: Path) -> None:
    """Usage sums are the same before a backup and after its restore, for more records than one batch holds."""
    count = 10 * BATCH_ROWS + 1
    source = _with_records(tmp_path / "a.db", count)
    sums = source.usage.query(UsageQuery(("tenant", "day")))
    assert source.backup(tmp_path / "b.gz")["usage"] == count
    source.close()
    copy = Ledger(f"sqlite:///{tmp_path / 'c.db'}")
    copy.restore(tmp_path / "b.gz")
    assert copy.usage.query(UsageQuery(("tenant", "day"))) == sums
    copy.close()
