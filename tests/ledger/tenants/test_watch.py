"""A watcher has the right snapshot while the database is reachable, unreachable, reachable again, or silent."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from cluster.api.outcomes import CallError, Outcome
from cluster.ledger.errors import StoreUnavailable
from cluster.ledger.store import Ledger
from cluster.ledger.tenants import watch
from cluster.ledger.tenants.watch import Watcher
from cluster.policy.tenants.identity import AccessSnapshot, KeyEntry, TenantEntry, authenticate
from cluster.policy.tenants.policy import TenantPolicy
from tests.ledger.conftest import PEPPER
from tests.support import postgres
from tests.support.cpu import time_within

pytestmark = pytest.mark.slow

DEADLINE_S = 20.0


class Clocks:
    """A wall clock and a monotonic clock. A test advances the clocks."""

    def __init__(self) -> None:
        self.wall, self.monotonic = 1000.0, 50.0

    def pass_(self, seconds: float) -> None:
        """Advance the wall clock and the monotonic clock."""
        self.wall += seconds
        self.monotonic += seconds


class Source:
    """Fake database. Reads fail while `unreachable` is set."""

    def __init__(self, clocks: Clocks) -> None:
        self.clocks = clocks
        self.unreachable = False
        self.sequence = 1
        self.tenants = {"acme": TenantEntry(TenantPolicy("acme"))}

    def read(self, before: AccessSnapshot | None) -> AccessSnapshot:
        """Return the newest snapshot. Raises StoreUnavailable while `unreachable` is set."""
        if self.unreachable:
            raise StoreUnavailable("the database is away")
        if before is not None and before.sequence == self.sequence:
            return AccessSnapshot(before.sequence, self.clocks.wall, before.tenants, before.keys)
        return AccessSnapshot(self.sequence, self.clocks.wall, dict(self.tenants))


@pytest.fixture
def clocks() -> Clocks:
    """A wall clock and a monotonic clock that the test advances."""
    return Clocks()


@pytest.fixture
def source(clocks: Clocks) -> Source:
    """Provide a fake database that is reachable at first."""
    return Source(clocks)


@pytest.fixture
def make(tmp_path: Path, clocks: Clocks, source: Source) -> Callable[..., Watcher]:
    """Factory of watchers for one gateway. A second watcher simulates the gateway after a restart."""

    def make_watcher(**options: object) -> Watcher:
        arguments = {"stale_after_s": 100.0, **options}
        return Watcher(
            source.read,
            tmp_path / "snapshot",
            wall=lambda: clocks.wall,
            monotonic=lambda: clocks.monotonic,
            **arguments,  # type: ignore[arg-type]
        )

    return make_watcher


def refusal(watcher: Watcher) -> str:
    """Return the message with which a watcher rejects a caller."""
    with pytest.raises(CallError) as caught:
        watcher.current()
    assert caught.value.outcome is Outcome.STORE_UNAVAILABLE
    assert caught.value.retry_after_s == 5.0
    return caught.value.message


def test_before_the_first_answer_nobody_is_let_in(make: Callable[..., Watcher], source: Source) -> None:
    """Without a reachable database and without a saved file, all calls are rejected with a reason. This includes calls
    of tenants that the configuration declares."""
    source.unreachable = True
    watcher = make(declared=[TenantPolicy("filed")])
    assert not watcher.poll()
    assert "has not reached its database" in refusal(watcher)
    assert watcher.statistics().error == "the database is away"


def test_the_last_snapshot_serves_for_a_while_then_not(
    make: Callable[..., Watcher], source: Source, clocks: Clocks
) -> None:
    """Calls are rejected once the last successful poll is older than stale_after_s, until the next successful poll."""
    watcher = make()
    assert watcher.poll()
    clocks.pass_(90)
    assert watcher.poll()
    source.unreachable = True
    clocks.pass_(100)
    assert not watcher.poll()
    assert set(watcher.current().tenants) == {"acme"}
    clocks.pass_(0.1)
    assert "longer than store.stale_after_s (100 s)" in refusal(watcher)
    source.unreachable = False
    assert watcher.poll()
    assert watcher.current().sequence == 1
    assert watcher.statistics().error == ""


def test_the_snapshot_outlives_the_process(make: Callable[..., Watcher], source: Source, clocks: Clocks) -> None:
    """A gateway that starts while the database is unreachable uses the snapshot that the gateway before it has saved.

    The age of the snapshot includes the time in which no gateway ran.
    """
    make().poll()
    source.unreachable = True
    clocks.pass_(60)
    restarted = make()
    assert set(restarted.current().tenants) == {"acme"}
    assert restarted.statistics().age_s == 60
    clocks.pass_(41)
    refusal(restarted)
    refusal(make())


def test_confirmations_reach_the_disk(make: Callable[..., Watcher], source: Source, clocks: Clocks) -> None:
    """The file with the snapshot of tenants and keys is written repeatedly, even if nothing has changed. So the
    snapshot is recent enough for a restart."""
    watcher = make()
    for _ in range(400):
        clocks.pass_(0.5)
        watcher.poll()
    source.unreachable = True
    restarted = make()
    assert restarted.statistics().age_s <= 25.5


@pytest.mark.parametrize("step_s", [-1e6, 1e6])
def test_clock_steps_neither_lock_out_nor_let_in(
    make: Callable[..., Watcher], source: Source, clocks: Clocks, step_s: float
) -> None:
    """A step of the wall clock does not shift the time at which a running gateway's snapshot becomes stale."""
    watcher = make()
    watcher.poll()
    source.unreachable = True
    clocks.wall += step_s
    clocks.pass_(99)
    watcher.poll()
    assert watcher.current().tenants
    clocks.pass_(2)
    refusal(watcher)


def test_a_file_from_the_future_does_not_last_forever(
    make: Callable[..., Watcher], source: Source, clocks: Clocks
) -> None:
    """A restarted watcher loads the saved tenants from a file. If the file's time is in the future, the file counts as
    new. It still becomes stale after `stale_after_s`."""
    make().poll()
    source.unreachable = True
    clocks.wall -= 1e6
    restarted = make()
    assert restarted.current().tenants
    clocks.pass_(101)
    refusal(restarted)


def test_declared_tenants_stand_over_the_databases(make: Callable[..., Watcher], source: Source) -> None:
    """If a tenant is in the configuration file and in the database, the policy in the file applies, both after the
    first poll of the database and after each change in it."""
    seen: list[AccessSnapshot] = []
    watcher = make(declared=[TenantPolicy("acme", weight=9.0)], on_change=seen.append)
    watcher.poll()
    watcher.poll()
    source.sequence, source.tenants = 2, {"b": TenantEntry(TenantPolicy("b"))}
    watcher.poll()
    assert [set(snapshot.tenants) for snapshot in seen] == [{"acme"}, {"acme", "b"}]
    assert watcher.current().tenants["acme"] == TenantEntry(TenantPolicy("acme", weight=9.0), "file")


def test_the_file_is_whole_and_private(tmp_path: Path) -> None:
    """Only the owner can read a saved snapshot, and it is loaded without changes. If a file is damaged, missing or in
    another format, loading returns None."""
    path = tmp_path / "s"
    snapshot = AccessSnapshot.of([TenantEntry(TenantPolicy("a"))], [KeyEntry("k", "a", b"d" * 32)], 5, 6.0)
    watch.save(path, snapshot)
    assert watch.load(path) == snapshot
    assert path.stat().st_mode & 0o077 == 0
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    condition = path.read_bytes()
    head, body = condition.split(b"\n")
    for bad in (
        b"",
        b"{}",
        condition[:-1],
        condition.replace(b'"a"', b'"b"'),
        json.dumps({**json.loads(head), "format": "x"}).encode() + b"\n" + body,
    ):
        path.write_bytes(bad)
        assert watch.load(path) is None
    assert watch.load(tmp_path / "none") is None


def test_a_disk_that_is_full_stops_nothing(make: Callable[..., Watcher], tmp_path: Path, source: Source) -> None:
    """A gateway serves the snapshot from memory if the file cannot be written."""
    (tmp_path / "snapshot").mkdir()
    watcher = make()
    assert watcher.poll()
    assert watcher.current().tenants


class Seen:
    """Callback that records the last snapshot and can wait for a snapshot."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._last = AccessSnapshot()

    def __call__(self, snapshot: AccessSnapshot) -> None:
        with self._changed:
            self._last = snapshot
            self._changed.notify_all()

    def wait(self, condition: Callable[[AccessSnapshot], bool], deadline_s: float = DEADLINE_S) -> None:
        """Wait until the last snapshot meets a condition."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self._last), deadline_s), "no such snapshot in time"


@pytest.fixture
def own_server() -> Iterator[postgres.PostgresServer]:
    """Provide a PostgreSQL server that the test may kill."""
    with postgres.running() as server:
        yield server


def test_suspend_and_resume_within_two_seconds(ledger: Ledger, tmp_path: Path) -> None:
    """A watcher gets the suspension and the resumption of a tenant in less than two seconds."""
    seen = Seen()
    ledger.tenants.create(TenantPolicy("acme"))
    watcher = Watcher(ledger.snapshots.read, tmp_path / "s", stale_after_s=60, on_change=seen)
    watcher.start()
    seen.wait(lambda s: "acme" in s.tenants)
    for suspended in (True, False) * 2:
        ledger.tenants.suspend("acme", suspended)
        with time_within(2.0):
            seen.wait(lambda s, w=suspended: s.tenants["acme"].policy.suspended is w)  # type: ignore[misc]
    watcher.stop()


def test_a_watcher_that_is_woken_does_not_wait_for_its_period(ledger: Ledger, tmp_path: Path) -> None:
    """After `poll_soon`, a watcher gets a change long before its period has ended."""
    seen = Seen()
    ledger.tenants.create(TenantPolicy("acme"))
    watcher = Watcher(ledger.snapshots.read, tmp_path / "s", stale_after_s=60, on_change=seen, period_s=3600)
    watcher.start()
    seen.wait(lambda s: "acme" in s.tenants)
    for suspended in (True, False) * 2:
        ledger.tenants.suspend("acme", suspended)
        watcher.poll_soon()
        seen.wait(lambda s, w=suspended: s.tenants["acme"].policy.suspended is w)  # type: ignore[misc]
    with time_within(5.0):
        watcher.stop(timeout_s=60)


def test_a_database_that_is_killed_and_comes_back(own_server: postgres.PostgresServer, tmp_path: Path) -> None:
    """While the database is down, a watcher serves the last snapshot. When the database is up again, the watcher gets
    later changes.

    A watcher that starts while the database is down serves the snapshot from disk.
    """
    url = own_server.new_database()
    ledger = Ledger(url, peppers=(PEPPER,))
    ledger.upgrade()
    ledger.tenants.create(TenantPolicy("acme"))
    seen = Seen()
    watcher = Watcher(ledger.snapshots.read, tmp_path / "s", stale_after_s=3600, on_change=seen, period_s=0.05)
    assert watcher.poll()  # the file is written before `poll` returns, but may be written after `on_change` is called
    watcher.start()
    own_server.kill()
    restarted = Watcher(Ledger(url).snapshots.read, tmp_path / "s", stale_after_s=3600)
    assert not restarted.poll()
    assert "database" in restarted.statistics().error
    assert postgres.PASSWORD not in restarted.statistics().error
    assert set(restarted.current().tenants) == set(watcher.current().tenants) == {"acme"}
    own_server.start()
    ledger.tenants.create(TenantPolicy("b"))
    seen.wait(lambda s: "b" in s.tenants)
    assert restarted.poll()
    assert set(restarted.current().tenants) == {"acme", "b"}
    watcher.stop()
    ledger.close()


def test_a_stop_does_not_wait_for_a_silent_database(tmp_path: Path) -> None:
    """`stop` returns in time although the database does not answer a running query."""
    asked, answer = threading.Event(), threading.Event()

    def read(_before: AccessSnapshot | None) -> AccessSnapshot:
        asked.set()
        answer.wait(DEADLINE_S)
        return AccessSnapshot()

    watcher = Watcher(read, tmp_path / "s", stale_after_s=60)
    watcher.start()
    assert asked.wait(DEADLINE_S)
    with time_within(5.0):
        watcher.stop(timeout_s=0.05)
    answer.set()


def test_a_saved_snapshot_of_another_database_is_dropped(tmp_path: Path) -> None:
    """A gateway that is pointed to another database forgets the tenants and keys of the first one with its first poll,
    whichever database has had more changes. A snapshot that the previous release saved, without an id of its database,
    is read anew too."""
    for number, (changes, with_id) in enumerate(((0, True), (9, True), (9, False))):
        first, second = (Ledger(f"sqlite:///{tmp_path / f'{name}{number}.db'}", peppers=(PEPPER,)) for name in "ab")
        for ledger in (first, second):
            ledger.upgrade()
        first.tenants.create(TenantPolicy("acme"))
        key = first.keys.create("acme")
        file = tmp_path / f"snapshot{number}"
        saved = first.snapshots.read()
        watch.save(file, saved if with_id else replace(saved, database_id=""))
        for name in ("acme", "b") if changes else ():
            second.tenants.create(TenantPolicy(name))
            for _ in range(changes // 2):
                second.keys.create(name)
        watcher = Watcher(second.snapshots.read, file, stale_after_s=1000.0)
        assert authenticate(watcher.current(), key.secret, (PEPPER,), 0.0).reason == "ok"
        assert watcher.poll()
        assert authenticate(watcher.current(), key.secret, (PEPPER,), 0.0).reason == "unknown"
        assert watcher.current() == replace(second.snapshots.read(), taken_at_s=watcher.current().taken_at_s)
        for ledger in (first, second):
            ledger.close()


def test_the_previous_release_keeps_the_database_id(database_url: str) -> None:
    """Each database has an id of its own. The statements of the previous release, which does not know the column, leave
    the id as it is."""
    ledger = Ledger(database_url)
    ledger.upgrade()
    before = ledger.snapshots.read()
    assert len(before.database_id) == 32
    engine = create_engine(database_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE change_sequence SET value = value + 1, reload_from = value WHERE id = 1"))
        assert connection.execute(text("SELECT value, reload_from FROM change_sequence")).one() == (2, 1)
    engine.dispose()
    after = ledger.snapshots.read(before)
    assert (after.sequence, after.database_id) == (2, before.database_id)
    ledger.close()
