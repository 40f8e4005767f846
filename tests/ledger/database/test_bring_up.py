"""`prepare_database_in_process` does the same as `prepare_database`, with the same errors, but in a child process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.ledger.database.bring_up import prepare_database, prepare_database_in_process
from cluster.ledger.errors import StoreUnavailable
from cluster.ledger.store import Ledger
from loadtests.children import ROOT
from tests.support.keyed import eventually

pytestmark = pytest.mark.slow

PROGRAM = """
import asyncio, sys
from cluster.ledger.database.bring_up import prepare_database_in_process
asyncio.run(prepare_database_in_process({url!r}))
print(*({{"alembic", "sqlalchemy"}} & set(sys.modules)))
"""


async def test_it_does_as_the_ledger_itself(database_url: str) -> None:
    """`prepare_database_in_process` does in a separate process what `prepare_database` does.

    On SQLite it creates the tables. On PostgreSQL without tables it fails with the error of `prepare_database`.
    """
    if database_url.startswith("sqlite"):
        await prepare_database_in_process(database_url)
    else:
        with pytest.raises(StoreUnavailable) as here:
            prepare_database(database_url)
        with pytest.raises(StoreUnavailable) as there:
            await prepare_database_in_process(database_url)
        assert str(there.value) == str(here.value)
        assert "db upgrade" in str(there.value)
        ledger = Ledger(database_url)
        ledger.upgrade()
        ledger.close()
        await prepare_database_in_process(database_url)
    ledger = Ledger(database_url)
    ledger.require_usable()
    ledger.close()


async def test_a_database_that_does_not_answer_is_told_without_its_password() -> None:
    """If the database's port is closed, the error message does not contain the password."""
    with pytest.raises(StoreUnavailable, match="does not answer") as error:
        await prepare_database_in_process("postgresql://headrace:hush@127.0.0.1:1/ledger")
    assert "hush" not in str(error.value)


async def test_what_is_no_address_is_told_too() -> None:
    """The error message for an invalid URL names the exception that the child process raised."""
    with pytest.raises(StoreUnavailable, match=r"cannot be checked: ValueError: store\.database_url: is no URL"):
        await prepare_database_in_process("nonsense")


async def test_it_ends_when_nobody_waits(tmp_path: Path) -> None:
    """Cancelling `prepare_database_in_process` kills the child process."""
    before = {child.pid for child in psutil.Process().children()}
    task = asyncio.create_task(prepare_database_in_process(f"sqlite:///{tmp_path / 'ledger.db'}"))
    new: set[int] = set()

    async def started() -> bool:
        new.update({child.pid for child in psutil.Process().children()} - before)
        return bool(new)

    await eventually(started, "the child process runs")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not any(psutil.pid_exists(pid) for pid in new)


def test_whoever_asks_imports_nothing_of_it(tmp_path: Path) -> None:
    """A process that calls `prepare_database_in_process` imports neither alembic nor SQLAlchemy."""
    program = PROGRAM.format(url=f"sqlite:///{tmp_path / 'ledger.db'}")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""
