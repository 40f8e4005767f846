"""What a gateway knows while its database is there, away, back, slow and replaced."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.api.outcomes import CallError, Outcome
from cluster.ledger.errors import StoreUnavailable
from cluster.ledger.store import Ledger
from cluster.ledger.tenants import watch
from cluster.ledger.tenants.watch import Watcher
from cluster.policy.tenants.identity import AccessSnapshot, KeyEntry, TenantEntry
from cluster.policy.tenants.policy import TenantPolicy
from tests.ledger.conftest import PEPPER
from tests.support import postgres

pytestmark = pytest.mark.slow

DEADLINE_S = 20.0


class Clocks:
    """A wall clock and a monotonic clock that the test moves."""

    def __init__(self) -> None:
        self.wall, self.monotonic = 1000.0, 50.0

    def pass_(self, seconds: float) -> None:
        """Time goes by."""
        self.wall += seconds
        self.monotonic += seconds


class Source:
    """A database that answers, or not."""

    def __init__(self, clocks: Clocks) -> None:
        self.clocks = clocks
        self.away = False
        self.sequence = 1
        self.tenants = {"acme": TenantEntry(TenantPolicy("acme"))}

    def read(self, before: AccessSnapshot | None) -> AccessSnapshot:
        """The newest snapshot."""
        if self.away:
            raise StoreUnavailable("the database is away")
        if before is not None and before.sequence == self.sequence:
            return AccessSnapshot(before.sequence, self.clocks.wall, before.tenants, before.keys)
        return AccessSnapshot(self.sequence, self.clocks.wall, dict(self.tenants))


@pytest.fixture
def clocks() -> Clocks:
    """Clocks of the test's own."""
    return Clocks()


@pytest.fixture
def source(clocks: Clocks) -> Source:
    """A database of the test's own."""
    return Source(clocks)


@pytest.fixture
def make(tmp_path: Path, clocks: Clocks, source: Source) -> Callable[..., Watcher]:
    """A gateway's watcher; a second one is the same gateway restarted."""

    def of(**options: object) -> Watcher:
        arguments = {"stale_after_s": 100.0, **options}
        return Watcher(
            source.read,
            tmp_path / "snapshot",
            wall=lambda: clocks.wall,
            monotonic=lambda: clocks.monotonic,
            **arguments,  # type: ignore[arg-type]
        )

    return of


def refusal(watcher: Watcher) -> str:
    """Why a call is refused."""
    with pytest.raises(CallError) as caught:
        watcher.current()
    assert caught.value.outcome is Outcome.STORE_UNAVAILABLE
    assert caught.value.retry_after_s == 5.0
    return caught.value.message


def test_before_the_first_answer_nobody_is_let_in(make: Callable[..., Watcher], source: Source) -> None:
    """Without a database and without a file a gateway refuses with the reason, even for declared tenants."""
    source.away = True
    watcher = make(declared=[TenantPolicy("filed")])
    assert not watcher.ask()
    assert "has not reached its database" in refusal(watcher)
    assert watcher.statistics().error == "the database is away"


def test_the_last_snapshot_serves_for_a_while_then_not(
    make: Callable[..., Watcher], source: Source, clocks: Clocks
) -> None:
    """Age counts from the last confirmation; past stale_after_s calls are refused, and an answer heals it at once."""
    watcher = make()
    assert watcher.ask()
    clocks.pass_(90)
    assert watcher.ask()
    source.away = True
    clocks.pass_(100)
    assert not watcher.ask()
    assert set(watcher.current().tenants) == {"acme"}
    clocks.pass_(0.1)
    assert "longer than store.stale_after_s (100)" in refusal(watcher)
    source.away = False
    assert watcher.ask()
    assert watcher.current().sequence == 1
    assert watcher.statistics().error == ""


def test_the_snapshot_outlives_the_process(make: Callable[..., Watcher], source: Source, clocks: Clocks) -> None:
    """A gateway that starts while the database is away serves from disk, and the time it was down counts."""
    make().ask()
    source.away = True
    clocks.pass_(60)
    again = make()
    assert set(again.current().tenants) == {"acme"}
    assert again.statistics().age_s == 60
    clocks.pass_(41)
    refusal(again)
    refusal(make())


def test_confirmations_reach_the_disk(make: Callable[..., Watcher], source: Source, clocks: Clocks) -> None:
    """Though nothing changes for long, the file stays young enough for a restart."""
    watcher = make()
    for _ in range(400):
        clocks.pass_(0.5)
        watcher.ask()
    source.away = True
    again = make()
    assert again.statistics().age_s <= 25.5


@pytest.mark.parametrize("step_s", [-1e6, 1e6])
def test_clock_steps_neither_lock_out_nor_let_in(
    make: Callable[..., Watcher], source: Source, clocks: Clocks, step_s: float
) -> None:
    """A step of the wall clock in a running gateway changes nothing; staleness still comes when it is due."""
    watcher = make()
    watcher.ask()
    source.away = True
    clocks.wall += step_s
    clocks.pass_(99)
    watcher.ask()
    assert watcher.current().tenants
    clocks.pass_(2)
    refusal(watcher)


def test_a_file_from_the_future_does_not_last_forever(
    make: Callable[..., Watcher], source: Source, clocks: Clocks
) -> None:
    """After a step back before a restart the file counts as new once, not until the clock has caught up."""
    make().ask()
    source.away = True
    clocks.wall -= 1e6
    again = make()
    assert again.current().tenants
    clocks.pass_(101)
    refusal(again)


def test_declared_tenants_stand_over_the_databases(make: Callable[..., Watcher], source: Source) -> None:
    """The file's policy is served from the first answer on, and after each change."""
    seen: list[AccessSnapshot] = []
    watcher = make(declared=[TenantPolicy("acme", weight=9.0)], on_change=seen.append)
    watcher.ask()
    watcher.ask()
    source.sequence, source.tenants = 2, {"b": TenantEntry(TenantPolicy("b"))}
    watcher.ask()
    assert [set(one.tenants) for one in seen] == [{"acme"}, {"acme", "b"}]
    assert watcher.current().tenants["acme"] == TenantEntry(TenantPolicy("acme", weight=9.0), "file")


def test_the_file_is_whole_and_private(tmp_path: Path) -> None:
    """It reads back equal and is its owner's; damaged, cut or foreign it is no snapshot."""
    path = tmp_path / "s"
    snapshot = AccessSnapshot.of([TenantEntry(TenantPolicy("a"))], [KeyEntry("k", "a", b"d" * 32)], 5, 6.0)
    watch.save(path, snapshot)
    assert watch.load(path) == snapshot
    assert path.stat().st_mode & 0o077 == 0
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    good = path.read_bytes()
    head, body = good.split(b"\n")
    for bad in (
        b"",
        b"{}",
        good[:-1],
        good.replace(b'"a"', b'"b"'),
        json.dumps({**json.loads(head), "format": "x"}).encode() + b"\n" + body,
    ):
        path.write_bytes(bad)
        assert watch.load(path) is None
    assert watch.load(tmp_path / "none") is None


def test_a_disk_that_is_full_stops_nothing(make: Callable[..., Watcher], tmp_path: Path, source: Source) -> None:
    """When the file cannot be written the gateway serves from memory."""
    (tmp_path / "snapshot").mkdir()
    watcher = make()
    assert watcher.ask()
    assert watcher.current().tenants


class Seen:
    """Waits until a watcher has told of something."""

    def __init__(self) -> None:
        self._told = threading.Condition()
        self._last = AccessSnapshot()

    def __call__(self, snapshot: AccessSnapshot) -> None:
        with self._told:
            self._last = snapshot
            self._told.notify_all()

    def wait(self, good: Callable[[AccessSnapshot], bool], deadline_s: float = DEADLINE_S) -> float:
        """Seconds until it was so."""
        began = time.monotonic()
        with self._told:
            assert self._told.wait_for(lambda: good(self._last), deadline_s), "not told in time"
        return time.monotonic() - began


@pytest.fixture
def own_server() -> Iterator[postgres.PostgresServer]:
    """A PostgreSQL that the test may kill."""
    with postgres.running() as server:
        yield server


def test_suspend_and_resume_within_two_seconds(ledger: Ledger, tmp_path: Path) -> None:
    """Each of four changes reaches a watching gateway in less than two seconds."""
    seen = Seen()
    ledger.tenants.create(TenantPolicy("acme"))
    watcher = Watcher(ledger.snapshots.read, tmp_path / "s", stale_after_s=60, on_change=seen)
    watcher.start()
    seen.wait(lambda s: "acme" in s.tenants)
    for suspended in (True, False) * 2:
        ledger.tenants.suspend("acme", suspended)
        assert seen.wait(lambda s, w=suspended: s.tenants["acme"].policy.suspended is w) < 2.0  # type: ignore[misc]
    watcher.stop()


def test_a_database_that_is_killed_and_comes_back(own_server: postgres.PostgresServer, tmp_path: Path) -> None:
    """Killed: the last snapshot serves, a restarted gateway serves from disk. Back: changes arrive by themselves."""
    url = own_server.new_database()
    ledger = Ledger(url, peppers=(PEPPER,))
    ledger.upgrade()
    ledger.tenants.create(TenantPolicy("acme"))
    seen = Seen()
    watcher = Watcher(ledger.snapshots.read, tmp_path / "s", stale_after_s=3600, on_change=seen, period_s=0.05)
    assert watcher.ask()  # answered by now, and on disk; those who are told of a change may be ahead of the disk
    watcher.start()
    own_server.kill()
    restarted = Watcher(Ledger(url).snapshots.read, tmp_path / "s", stale_after_s=3600)
    assert not restarted.ask()
    assert "database" in restarted.statistics().error
    assert postgres.PASSWORD not in restarted.statistics().error
    assert set(restarted.current().tenants) == set(watcher.current().tenants) == {"acme"}
    own_server.start()
    ledger.tenants.create(TenantPolicy("b"))
    seen.wait(lambda s: "b" in s.tenants)
    assert restarted.ask()
    assert set(restarted.current().tenants) == {"acme", "b"}
    watcher.stop()
    ledger.close()


def test_a_stop_does_not_wait_for_a_silent_database(tmp_path: Path) -> None:
    """A gateway can end although its database has stopped answering in mid-question."""
    asked, answer = threading.Event(), threading.Event()

    def read(_before: AccessSnapshot | None) -> AccessSnapshot:
        asked.set()
        answer.wait(DEADLINE_S)
        return AccessSnapshot()

    watcher = Watcher(read, tmp_path / "s", stale_after_s=60)
    watcher.start()
    assert asked.wait(DEADLINE_S)
    began = time.monotonic()
    watcher.stop(timeout_s=0.05)
    assert time.monotonic() - began < 5
    answer.set()
