"""Stored state is private to its owner under any umask: folders have mode 0700, and databases have mode 0600."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.cli.local.run_folder import RunFolder
from cluster.gateway.resume_tokens.first_claims import FileFirstClaims
from cluster.ledger.store import Ledger
from cluster.policy.tenants.policy import TenantPolicy
from cluster.process.private_files import make_private_folder, narrow
from tests.support.gateway_process import gateway_process

pytestmark = pytest.mark.slow


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """Set the process's umask for a `with` block."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def accessible(folder: Path) -> dict[str, str]:
    """Find the paths that other users may enter, read or write, among `folder` and everything in it. Returns the mode
    of each such path."""
    paths = [folder, *folder.rglob("*")]
    return {str(path): oct(stat.S_IMODE(path.stat().st_mode)) for path in paths if path.stat().st_mode & 0o077}


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o777])
def test_a_ledgers_files_are_private(tmp_path: Path, mask: int) -> None:
    """A ledger's database file, WAL file and index file are private: they hold names, key hashes and the audit log."""
    folder = tmp_path / "state"
    with umask(mask):
        make_private_folder(folder)
        ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")
        ledger.upgrade()
        ledger.tenants.create(TenantPolicy("acme"))
        names = {path.name for path in folder.iterdir()}
        assert {"ledger.db", "ledger.db-wal", "ledger.db-shm"} <= names
        assert accessible(folder) == {}
        ledger.close()


def test_what_an_earlier_release_made_is_narrowed(tmp_path: Path) -> None:
    """Files that an earlier release created with wider permissions are made private."""
    folder = tmp_path / "state"
    make_private_folder(folder)
    url = f"sqlite:///{folder / 'ledger.db'}"
    first = Ledger(url)
    first.upgrade()
    for file in (folder, *folder.iterdir()):
        file.chmod(0o755 if file.is_dir() else 0o644)
    make_private_folder(folder)
    second = Ledger(url)
    second.tenants.create(TenantPolicy("acme"))
    assert accessible(folder) == {}
    first.close()
    second.close()


async def test_the_record_of_resumptions_is_private(tmp_path: Path) -> None:
    """The SQLite file of resume claims is private, and so are the folders above it."""
    with umask(0o000):
        assert await FileFirstClaims(tmp_path / "deep" / "state" / "taken.db").claim_first("one", 9e9)
        assert accessible(tmp_path / "deep") == {}


def test_a_run_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new run folder and the parent folders created for it are private, because a run folder holds secrets."""
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path / "new" / "cache"))
    with umask(0o000), RunFolder("x").lock():
        assert {path for path in accessible(tmp_path / "new") if Path(path).is_dir()} == set()


async def test_a_gateways_folder_is_private(tmp_path: Path) -> None:
    """The files of a running gateway are private, even if the gateway's folder had wider permissions before."""
    folder = tmp_path / "gateway"
    folder.mkdir(mode=0o755)
    with umask(0o000):
        async with gateway_process(folder):
            assert accessible(folder) == {}


def test_shared_folders_stay_as_they_are(tmp_path: Path) -> None:
    """A shared folder, such as /tmp, keeps its mode."""
    tmp_path.chmod(0o1777)
    narrow(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o1777
    narrow(tmp_path / "missing")
