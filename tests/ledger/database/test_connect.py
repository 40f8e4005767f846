"""Errors of the database. An error that comes from the state of the database becomes StoreUnavailable; an error that
comes from the values of a statement passes unchanged."""

from __future__ import annotations

import time
from pathlib import Path

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import errors
from sqlalchemy import create_engine, exc

from cluster.ledger.database.connect import translate_errors
from cluster.ledger.errors import StoreUnavailable
from cluster.ledger.rows import UsageQuery
from cluster.ledger.store import Ledger
from cluster.ledger.usage.spool import Replayer, Spool
from tests.ledger.samples import record
from tests.support import postgres

ENGINE = create_engine("postgresql+psycopg://headrace@127.0.0.1:1/none")
STATE_CLASSES = ("08", "0A", "25", "26", "28", "3D", "3F", "53", "55", "57", "58", "XX")
"""Classes of error codes that PostgreSQL reports whatever the values of the statement are."""
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, psycopg.Error)]
CODES = sorted({kind.sqlstate for kind in KINDS if kind.sqlstate is not None})


def raised_for(code: str, message: str = "reason") -> Exception:
    """Return the exception that `translate_errors` raises for one of PostgreSQL's error codes."""
    cause = errors.lookup(code)(message)
    wrapped = exc.DBAPIError.instance("INSERT", None, cause, psycopg.Error, dialect=ENGINE.dialect)
    try:
        with translate_errors(ENGINE):
            raise wrapped
    except (exc.DBAPIError, StoreUnavailable) as error:
        return error


@given(st.sampled_from([code for code in CODES if code[:2] in STATE_CLASSES] + ["42501", "42P01", "42703", "42P10"]))
def test_the_state_of_the_database_is_no_fault_of_a_record(code: str) -> None:
    """A read-only, starting, full, damaged or differently migrated database is reported as StoreUnavailable."""
    assert isinstance(raised_for(code), StoreUnavailable)


@given(st.sampled_from([code for code in CODES if code[:2] in ("22", "23")] + ["42601"]))
def test_faults_of_a_statement_are_not_the_database_state(code: str) -> None:
    """Errors that depend on the values, and invalid SQL, pass unchanged."""
    assert isinstance(raised_for(code), exc.DBAPIError)


def test_usage_waits_for_a_read_only_database(server: postgres.PostgresServer, tmp_path: Path) -> None:
    """Usage records stay in the spool while the database is read-only, and no record is rejected. When new connections
    can write again, the records are inserted: no connection from the read-only time is used any more."""
    url = server.new_database()
    name = url.rpartition("/")[2]
    ledger = Ledger(url)
    ledger.upgrade()
    set_read_only(server, name, "on")
    ledger.close()
    spool = Spool(tmp_path / "spool", linger_s=0.0)
    replayer = Replayer(spool, ledger.usage.insert)
    try:
        for number in range(3):
            position = spool.append(record(f"r{number}"))
        assert spool.wait_durable(position, 10)
        with pytest.raises(StoreUnavailable, match="accepts no writes"):
            replayer.replay()
        assert (spool.statistics().pending, spool.statistics().rejected) == (3, 0)
        with pytest.raises(StoreUnavailable):
            ledger.resumed_segments.claim([("a", time.time() + 5.0)], time.time())
        set_read_only(server, name, "off")
        assert replayer.replay() == 3
        assert (spool.statistics().pending, spool.statistics().rejected) == (0, 0)
        assert len(list(ledger.usage.records(UsageQuery()))) == 3
    finally:
        spool.close()
        ledger.close()


def set_read_only(server: postgres.PostgresServer, name: str, value: str) -> None:
    """Make new sessions of a database read-only (`on`) or not (`off`)."""
    with server.connect("postgres") as connection:
        connection.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = {value}'.encode())
