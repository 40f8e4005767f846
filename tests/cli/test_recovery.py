"""Tests of the recovery that docs/backups.md describes. PostgreSQL is restored to a moment before a disaster, and
Headrace works again."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from cluster.ledger.store import Ledger
from cluster.policy.tenants.identity import authenticate
from tests.ledger.samples import record
from tests.support import postgres
from tests.support.shell import until

pytestmark = [pytest.mark.slow, pytest.mark.needs("postgresql")]
Run = Callable[..., Result]
PEPPER = "p" * 64
ARCHIVING = {
    "wal_level": "replica",
    "max_wal_senders": "4",
    "archive_mode": "on",
    "archive_command": "cp %p {folder}/archive/%f.partial && mv {folder}/archive/%f.partial {folder}/archive/%f",
}


@pytest.fixture
def server() -> Iterator[postgres.PostgresServer]:
    """Provide a PostgreSQL server that archives its write-ahead log into the folder `archive`."""
    with postgres.running(ARCHIVING) as running:
        running.write("archive/.keep", "")
        yield running


def good(result: Result) -> Any:
    """Return the JSON value that a successful command printed."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def now(server: postgres.PostgresServer) -> str:
    """Return the server's time in the form that `recovery_target_time` requires."""
    with server.connect("postgres") as connection:
        row = connection.execute("SELECT clock_timestamp()::text").fetchone()
    assert row is not None
    return str(row[0])


def recover(server: postgres.PostgresServer, moment: str) -> None:
    """Kill the server, restore its base backup, and replay the archived log up to `moment`."""
    server.kill()
    shutil.move(server.folder / "data", server.folder / "data-lost")
    shutil.move(server.folder / "base", server.folder / "data")
    with (server.folder / "data" / "postgresql.auto.conf").open("a") as settings:
        settings.write(f"restore_command = 'cp {server.folder}/archive/%f %p'\n")
        settings.write(f"recovery_target_time = '{moment}'\nrecovery_target_action = 'promote'\n")
    server.write("data/recovery.signal", "")
    server.start()

    def is_open() -> bool:
        with server.connect("postgres") as connection:
            return connection.execute("SELECT pg_is_in_recovery()").fetchone() == (False,)

    until(is_open, "the recovery ends")


def test_a_ledger_comes_back_as_it_was_at_a_moment(run: Run, server: postgres.PostgresServer, tmp_path: Path) -> None:
    """A recovery restores the ledger as it was at a chosen time after the base backup: tenants, keys, usage, schema.

    A usage record that is in the restored ledger and that a gateway writes again is counted once. If a key was
    revoked after the chosen time, the key works again, and `audit` does not show the revocation.
    """
    url = server.new_database()
    pepper = tmp_path / "pepper"
    pepper.write_text(PEPPER)
    at = ("--database-url", url)
    with_pepper = (*at, "--pepper-file", str(pepper))
    assert run("db", "upgrade", *at).exit_code == 0
    good(run("tenants", "create", "acme", *at, "--json"))
    early = good(run("keys", "create", "acme", *with_pepper, "--json"))
    server.run("pg_basebackup", f"--dbname=host=127.0.0.1 port={server.port} user=headrace", "--pgdata=base",
               "--checkpoint=fast", "--no-sync")  # fmt: skip

    ledger = Ledger(url, peppers=(PEPPER.encode(),))
    later = good(run("keys", "create", "acme", *with_pepper, "--json"))
    ledger.usage.insert([record("r1", prompt_tokens=100), record("r2", prompt_tokens=20)])
    moment = now(server)
    ledger.usage.insert([record("r3", prompt_tokens=3)])
    assert run("keys", "revoke", "acme", early["id"], "--reason", "stolen", *at).exit_code == 0
    assert run("tenants", "delete", "acme", "--erase", "--yes", "--reason", "the disaster", *at).exit_code == 0
    ledger.close()
    with server.connect("postgres") as connection:
        last = connection.execute("SELECT pg_walfile_name(pg_switch_wal())").fetchone()
    assert last is not None
    until((server.folder / "archive" / last[0]).exists, "the log is archived")

    recover(server, moment)
    assert good(run("db", "check", *at, "--json"))["usable"] is True
    assert [tenant["name"] for tenant in good(run("tenants", "list", *at, "--json"))] == ["acme"]
    (total,) = good(run("usage", "--group-by", "tenant", *at, "--json"))
    assert (total["requests"], total["prompt_tokens"]) == (2, 120)
    ledger = Ledger(url, peppers=(PEPPER.encode(),))
    snapshot = ledger.snapshots.read()
    for key in (early, later):
        assert authenticate(snapshot, key["key"], (PEPPER.encode(),), time.time()).reason == "ok"
    assert "keys.revoke" not in {event["action"] for event in good(run("audit", *at, "--json"))}
    ledger.usage.insert([record("r2", prompt_tokens=20), record("r3", prompt_tokens=3)])
    ledger.close()
    (total,) = good(run("usage", "--group-by", "tenant", *at, "--json"))
    assert (total["requests"], total["prompt_tokens"]) == (3, 123)
    assert run("keys", "revoke", "acme", early["id"], "--reason", "stolen", *at).exit_code == 0
