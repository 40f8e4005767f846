"""Create SQLAlchemy engines whose transactions behave alike on SQLite and PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from cluster.ledger.errors import StoreUnavailable
from cluster.process.private_files import make_private_database

DRIVERS = ("sqlite", "postgresql+psycopg")
CONNECT_TIMEOUT_S = 3
STATEMENT_TIMEOUT_MS = 30_000
SQLITE_BUSY_MS = 10_000
_SQLITE_RETRY_S = 0.01
READ_ONLY, NOT_SUPPORTED, SYNTAX_ERROR = "25006", "0A000", "42601"
"""Error codes (SQLSTATE) of PostgreSQL."""
UNUSABLE_CLASSES = ("26", "3D", "3F", "42")
"""Classes of PostgreSQL's error codes for a prepared statement, a database, a schema or a table that is missing or
differs, and for missing rights."""


def parse_url(database_url: str, password: str = "") -> URL:
    """Parse and check a database URL. Raises ValueError.

    The error message names the remedy and never contains a password.
    """
    try:
        url = make_url(database_url)
    except ArgumentError:
        raise ValueError("store.database_url: is no URL; write sqlite:///file or postgresql+psycopg://…") from None
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername == "sqlite+pysqlite":
        url = url.set(drivername="sqlite")
    if url.drivername not in DRIVERS:
        raise ValueError(f"store.database_url: {url.drivername} is not served; use one of {', '.join(DRIVERS)}")
    if url.drivername == "sqlite" and url.database in (None, "", ":memory:"):
        raise ValueError("store.database_url: an in-memory database is lost at exit; name a file: sqlite:///file")
    return url.set(password=password) if password and url.drivername != "sqlite" else url


def make_engine(database_url: str, password: str | None = None) -> Engine:
    """Return an SQLAlchemy engine for the ledger's database, without connecting to it.

    If `password` is None, the password is read from the environment variable HEADRACE_DATABASE_PASSWORD.
    """
    url = parse_url(database_url, os.environ.get("HEADRACE_DATABASE_PASSWORD", "") if password is None else password)
    if url.drivername == "sqlite":
        return _sqlite(url)
    settings = f"-c statement_timeout={STATEMENT_TIMEOUT_MS} -c lock_timeout={STATEMENT_TIMEOUT_MS}"
    arguments: dict[str, Any] = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "options": settings,
        "application_name": "headrace",
        # while a statement waits, detect a database that became unreachable without closing the connection
        "tcp_user_timeout": 5000,
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
    }
    return create_engine(
        url, connect_args=arguments, pool_pre_ping=True, pool_size=4, max_overflow=4, pool_timeout=CONNECT_TIMEOUT_S
    )


def _sqlite(url: URL) -> Engine:
    folder = Path(str(url.database)).parent
    if not folder.is_dir():
        raise ValueError(f"store.database_url: the folder {folder} does not exist; create it")
    engine = create_engine(url, connect_args={"timeout": SQLITE_BUSY_MS / 1000})

    @event.listens_for(engine, "do_connect")
    def make_private(*_: Any) -> None:
        make_private_database(Path(str(url.database)))

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # only the "begin" listener below starts transactions, reads included
        for pragma in (
            f"busy_timeout={SQLITE_BUSY_MS}",
            "synchronous=FULL",  # a spool file is deleted after commit, so a commit must survive a power cut
            "foreign_keys=ON",
        ):
            connection.execute(f"PRAGMA {pragma}")
        _enable_wal(connection)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        reading = connection.get_execution_options().get("headrace_reading")
        # with a plain BEGIN, a transaction that reads and then writes fails if another transaction wrote in between
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    return engine


def _enable_wal(connection: sqlite3.Connection) -> None:
    """Switch a database to write-ahead logging.

    The switch is retried, because SQLite's busy_timeout does not apply when two processes switch at the same time.
    """
    give_up_at = time.monotonic() + SQLITE_BUSY_MS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > give_up_at:
                raise
        time.sleep(_SQLITE_RETRY_S)


@contextlib.contextmanager
def translate_errors(engine: Engine) -> Iterator[None]:
    """Raise StoreUnavailable if the database is unreachable, busy, read-only or unusable.

    Errors that depend on the values of the statement (DataError, IntegrityError) and errors of this program, such as
    invalid SQL, pass unchanged.
    """
    try:
        yield
    except DBAPIError as error:
        if _is_read_only(error):
            # A server that is promoted, or an address that moves to the primary, does not end the open connections to
            # a standby. Only a new connection can reach a server that accepts writes.
            engine.dispose()
            raise StoreUnavailable(
                f"the database {url_of(engine)} accepts no writes: {_first_line(error)}; "
                "promote the server, or point store.database_url to the primary"
            ) from error
        if error.connection_invalidated or _is_unusable(error):
            raise StoreUnavailable(
                f"the database {url_of(engine)} cannot be used: {_first_line(error)}; `headrace db check` says why"
            ) from error
        if isinstance(error, OperationalError):
            raise StoreUnavailable(f"the database {url_of(engine)} does not answer: {_first_line(error)}") from error
        raise
    except PoolTimeout as error:
        raise StoreUnavailable(f"the database {url_of(engine)} is too busy: the pool has no free connection") from error


def _sqlstate(error: DBAPIError) -> str:
    """Return PostgreSQL's error code, or "" for an error of SQLite or of the driver."""
    return getattr(error.orig, "sqlstate", None) or ""


def _is_read_only(error: DBAPIError) -> bool:
    """Return whether PostgreSQL is a standby or read-only."""
    code = _sqlstate(error)
    return code == READ_ONLY or (code == NOT_SUPPORTED and "recovery" in str(error.orig))


def _is_unusable(error: DBAPIError) -> bool:
    """Return whether the cause is the state of the database: its tables, its rights, its files or its connection."""
    if isinstance(error, ProgrammingError):
        code = _sqlstate(error)
        return code[:2] in UNUSABLE_CLASSES and code != SYNTAX_ERROR
    if isinstance(error, OperationalError):
        return any(words in str(error.orig) for words in ("no such table", "not a database", "malformed"))
    return not isinstance(error, DataError | IntegrityError)


def _first_line(error: DBAPIError) -> str:
    return str(error.orig).strip().split("\n")[0]


def url_of(engine: Engine) -> str:
    """Return the database's URL without the password, for messages."""
    return engine.url.render_as_string(hide_password=True)


@contextlib.contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Open a read-only transaction. All statements in the transaction read the same snapshot."""
    with translate_errors(engine):
        options: dict[str, Any] = {"headrace_reading": True}
        if engine.dialect.name == "postgresql":
            options |= {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        with engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection


@contextlib.contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Open a transaction that can write. The transaction is committed at the end and rolled back on an exception."""
    with translate_errors(engine), engine.begin() as connection:
        yield connection
