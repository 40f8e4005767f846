"""Ledgers over both databases: a SQLite file and a database of a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.ledger.store import Ledger
from tests.support import postgres

PEPPER = b"p" * 32


@pytest.fixture(scope="session")
def server() -> Iterator[postgres.PostgresServer]:
    """One PostgreSQL server for the session; each test creates its own database."""
    with postgres.running() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database, of each kind in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    running: postgres.PostgresServer = request.getfixturevalue("server")
    return running.new_database()


@pytest.fixture
def ledger(database_url: str) -> Iterator[Ledger]:
    """A ledger with its tables created."""
    ledger = Ledger(database_url, peppers=(PEPPER,))
    ledger.upgrade()
    yield ledger
    ledger.close()
