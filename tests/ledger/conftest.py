"""Fixtures of ledgers on a SQLite file and on a database of a real PostgreSQL server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.ledger.store import Ledger
from tests.support import postgres

PEPPER = b"p" * 32


@pytest.fixture(scope="session")
def server() -> Iterator[postgres.PostgresServer]:
    """A PostgreSQL server for the whole test session. Each test creates a database of its own."""
    with postgres.running() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database. Each test runs twice: with a SQLite file, and with a PostgreSQL database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    running: postgres.PostgresServer = request.getfixturevalue("server")
    return running.new_database()


@pytest.fixture
def ledger(database_url: str) -> Iterator[Ledger]:
    """A ledger on a database with all tables."""
    ledger = Ledger(database_url, peppers=(PEPPER,))
    ledger.upgrade()
    yield ledger
    ledger.close()
