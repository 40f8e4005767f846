"""Every record that the spool acknowledges as durable is stored in the database exactly once, despite crashes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.ledger.errors import StoreUnavailable
from cluster.ledger.rows import UsageQuery
from cluster.ledger.store import Ledger
from cluster.ledger.usage.records import UsageRecord
from cluster.ledger.usage.spool import REJECTED, Replayer, Spool, decode, encode
from tests.ledger.samples import record

pytestmark = pytest.mark.slow

HOSTILE = HealthCheck.function_scoped_fixture


class Database:
    """Fake database that stores each record id once.

    Each entry of `deaths` makes one insert fail before or after the commit.
    """

    def __init__(self, deaths: Sequence[str] = ()) -> None:
        self.rows: dict[str, UsageRecord] = {}
        self.deaths = list(deaths)
        self.bad: set[str] = set()
        self.calls = 0

    def insert(self, records: Sequence[UsageRecord]) -> None:
        """Insert records in one transaction."""
        self.calls += 1
        death = self.deaths.pop(0) if self.deaths else ""
        if death == "before":
            raise StoreUnavailable("away")
        if any(new.record_id in self.bad for new in records):
            raise ValueError("value out of range")
        for new in records:
            self.rows.setdefault(new.record_id, new)
        if death == "after":
            raise StoreUnavailable("gone after commit")


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Spool]]:
    """Provide a function that makes spools in one folder. The spools are closed at the end of the test."""
    spools: list[Spool] = []

    def make_spool(**options: object) -> Spool:
        spools.append(Spool(tmp_path / "spool", linger_s=0.0, **options))  # type: ignore[arg-type]
        return spools[-1]

    yield make_spool
    for spool in spools:
        try:
            spool.close()
        except OSError:
            continue  # closed by the test


def fill(spool: Spool, *numbers: int) -> None:
    """Append records with the given numbers and wait until all records are on disk."""
    for number in numbers:
        position = spool.append(record(f"r{number}"))
    assert spool.wait_durable(position, 10)


def test_records_arrive_once_and_segments_go(make: Callable[..., Spool], tmp_path: Path) -> None:
    """Appended records are moved to the database, and afterwards no record is pending and no segment file is left."""
    spool, database = make(), Database()
    fill(spool, 1, 2, 3)
    assert (spool.statistics().pending, spool.statistics().durable) == (3, 3)
    assert spool.statistics().oldest_at_s is not None
    assert Replayer(spool, database.insert).replay() == 3
    assert database.rows == {f"r{n}": record(f"r{n}") for n in (1, 2, 3)}
    assert (spool.statistics().pending, spool.statistics().oldest_at_s) == (0, None)
    assert list((tmp_path / "spool").glob("usage-*")) == []
    assert Replayer(spool, database.insert).replay() == 0


def test_durable_is_told_in_order(make: Callable[..., Spool]) -> None:
    """The spool reports up to which position its records are durable. The reported positions only grow, and the last
    reported position is the position of the last record."""
    positions: list[int] = []
    done = threading.Event()

    def on_durable(position: int) -> None:
        positions.append(position)
        if position == 100:
            done.set()

    spool = make(on_durable=on_durable)
    assert [spool.append(record(f"r{n}")) for n in range(100)] == list(range(1, 101))
    assert done.wait(60)
    assert positions == sorted(positions)


def test_what_a_dead_process_left_is_moved_by_the_next(make: Callable[..., Spool]) -> None:
    """Records that are spooled while the database is unreachable survive a restart of the spool, in the same order."""
    first = make()
    fill(first, 1, 2)
    with pytest.raises(StoreUnavailable):
        Replayer(first, Database(["before"]).insert).replay()
    fill(first, 3)
    first.close()
    second, database = make(), Database()
    assert second.statistics().pending == 3
    fill(second, 4)
    assert Replayer(second, database.insert).replay() == 4
    assert list(database.rows) == ["r1", "r2", "r3", "r4"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HOSTILE])
@given(
    steps=st.lists(st.sampled_from(["append", "move", "restart"]), max_size=25),
    deaths=st.lists(st.sampled_from(["", "before", "after"]), max_size=12),
)
def test_no_crash_loses_or_doubles(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str], deaths: list[str]
) -> None:
    """Each record is stored exactly once after any sequence of appends, replays, restarts and database failures."""
    folder, database, number = tmp_path_factory.mktemp("spool"), Database(deaths), 0
    spool = Spool(folder, linger_s=0.0, max_segment_bytes=600)
    for step in steps:
        if step == "append":
            number += 1
            fill(spool, number)
        elif step == "move":
            try:
                Replayer(spool, database.insert, batch_records=2).replay()
            except StoreUnavailable:
                continue
        else:
            spool.close()
            spool = Spool(folder, linger_s=0.0, max_segment_bytes=600)
    database.deaths.clear()
    Replayer(spool, database.insert, batch_records=2).replay()
    assert sorted(database.rows) == sorted(f"r{n + 1}" for n in range(number))
    assert spool.statistics().pending == 0
    spool.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HOSTILE])
@given(st.data())
def test_a_torn_tail_costs_only_itself(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """If a segment file is truncated at any byte, all its complete lines and all later records are stored."""
    folder = tmp_path_factory.mktemp("spool")
    lines = [encode(record(f"r{n}")) for n in range(4)]
    whole = b"".join(lines)
    cut = data.draw(st.integers(0, len(whole)))
    (folder / "usage-000000000001.jsonl").write_bytes(whole[:cut])
    expected = [f"r{n}" for n in range(4) if len(b"".join(lines[: n + 1])) <= cut]
    spool, database = Spool(folder, linger_s=0.0), Database()
    fill(spool, 9)
    Replayer(spool, database.insert).replay()
    assert list(database.rows) == [*expected, "r9"]
    assert not (folder / REJECTED).exists()
    spool.close()


def test_a_changed_line_is_kept_aside(make: Callable[..., Spool], tmp_path: Path) -> None:
    """A line with a wrong checksum is rejected, counted and kept in a file, and the other lines are stored."""
    folder = tmp_path / "spool"
    folder.mkdir()
    bad = encode(record("r2")).replace(b'"prompt_tokens":10', b'"prompt_tokens":99')
    (folder / "usage-000000000007.jsonl").write_bytes(encode(record("r1")) + bad + encode(record("r3")))
    spool, database = make(), Database()
    Replayer(spool, database.insert).replay()
    assert list(database.rows) == ["r1", "r3"]
    assert spool.statistics().rejected == 1
    assert "checksum" in (folder / REJECTED).read_text()
    spool.close()
    assert make().statistics().rejected == 1


def test_one_bad_record_does_not_hold_up_the_rest(make: Callable[..., Spool], tmp_path: Path) -> None:
    """Records that the database rejects are kept in a file, and all other records are stored."""
    spool, database = make(), Database()
    database.bad = {"r13", "r40"}
    fill(spool, *range(64))
    Replayer(spool, database.insert).replay()
    assert set(database.rows) == {f"r{n}" for n in range(64)} - database.bad
    assert spool.statistics().rejected == 2
    assert (tmp_path / "spool" / REJECTED).read_text().count("value out of range") == 2


def test_a_disk_that_fails_is_told_and_tried_again(make: Callable[..., Spool], tmp_path: Path) -> None:
    """While no segment can be created, no record is durable and the statistics show the error.

    After the failure is repaired, all records are stored.
    """
    spool, database = make(), Database()
    blocker = tmp_path / "spool" / "usage-000000000001.jsonl"
    blocker.mkdir()  # no file can be created at this path
    position = spool.append(record("r1"))
    assert not spool.wait_durable(position, 0.3)
    assert "exists" in spool.statistics().error
    assert spool.statistics().pending == 1
    blocker.rmdir()
    assert spool.wait_durable(position, 10)
    assert spool.statistics().error == ""
    Replayer(spool, database.insert).replay()
    assert list(database.rows) == ["r1"]


def test_a_record_that_is_being_written_is_pending(make: Callable[..., Spool], monkeypatch: pytest.MonkeyPatch) -> None:
    """A record counts as pending at every moment from `append` until it is in the database, also while the disk is
    writing it."""
    fsync, reached, may_end = os.fsync, threading.Event(), threading.Event()

    def slow_fsync(handle: int) -> None:
        reached.set()
        assert may_end.wait(10)
        fsync(handle)

    spool = make()
    position = spool.append(record("before"))
    assert spool.wait_durable(position, 10)
    monkeypatch.setattr(os, "fsync", slow_fsync)
    position = spool.append(record("slow"))
    assert reached.wait(10)
    assert spool.statistics().pending == 2
    may_end.set()
    assert spool.wait_durable(position, 10)
    assert spool.statistics().pending == 2


def test_a_folder_has_one_owner(make: Callable[..., Spool]) -> None:
    """Opening a second spool in the same folder raises ValueError, and a closed spool accepts no records."""
    spool = make()
    with pytest.raises(ValueError, match="in use by another process"):
        make()
    spool.close()
    with pytest.raises(ValueError, match="closed"):
        spool.append(record())
    make()


def test_lines_read_back() -> None:
    """Decoding an encoded record gives the same record, and decoding a damaged line raises ValueError."""
    odd = record("r1", labels={"ü\n": "🎈 '\""}, ttft_s=None)
    assert decode(encode(odd)[:-1]) == odd
    for bad in (b"", b"zzzzzzzz {}", b"00000000", encode(odd)[1:-1]):
        with pytest.raises(ValueError, match=r".*"):
            decode(bad)


def line_of(values: dict[str, object]) -> bytes:
    """Return the line of the spool for a record with these fields. All releases write lines in this form."""
    body = json.dumps(values).encode()
    return b"%08x %s" % (zlib.crc32(body), body)


def test_lines_of_other_releases_read_back(make: Callable[..., Spool], tmp_path: Path) -> None:
    """A line of an earlier release that lacks reasoning tokens is read with 0 reasoning tokens. An unknown field of a
    later release is dropped."""
    values = record("r1").as_json()
    earlier = {name: value for name, value in values.items() if name != "reasoning_tokens"}
    folder = tmp_path / "spool"
    folder.mkdir()
    lines = [line_of(earlier), line_of({**values, "record_id": "r2", "later": 1})]
    (folder / "usage-000000000001.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    database = Database()
    Replayer(make(), database.insert).replay()
    assert list(database.rows.values()) == [record("r1", reasoning_tokens=0), record("r2", request_id="q-r1")]


PROGRAM = """
import sys
from pathlib import Path
from cluster.ledger.usage.spool import Replayer, Spool
from cluster.ledger.store import Ledger
from tests.ledger.samples import record
folder, url, start = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
ledger = Ledger(url)
reported = 0
def durable(position):
    global reported
    sys.stdout.write("".join(f"r{start + n}\\n" for n in range(reported, position)))
    sys.stdout.flush()
    reported = position
spool = Spool(folder, on_durable=durable, max_segment_bytes=2000)
replayer = Replayer(spool, ledger.usage.insert, period_s=0.001, batch_records=7)
replayer.start()
for n in range(100_000):
    spool.wait_durable(spool.append(record(f"r{start + n}")) - 20, 10)
"""


@pytest.mark.slow
def test_killed_at_random_points(database_url: str, tmp_path: Path) -> None:
    """After the process was killed at random points, every record that was reported as durable is in the database
    exactly once."""
    ledger = Ledger(database_url)
    ledger.upgrade()
    chance, durable = random.Random(3), set[str]()
    for life in range(5):
        arguments = [sys.executable, "-c", PROGRAM, str(tmp_path / "spool"), database_url, str(life * 1_000_000)]
        with subprocess.Popen(
            arguments, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."}
        ) as process:
            assert process.stdout is not None
            for _ in range(chance.randrange(1, 400)):
                durable.add(process.stdout.readline().strip())
            process.send_signal(signal.SIGKILL)
            durable |= {line.strip() for line in process.stdout if line.endswith("\n")}
    spool = Spool(tmp_path / "spool")
    Replayer(spool, ledger.usage.insert).replay()
    spool.close()
    rows = [row.record_id for row in ledger.usage.records(UsageQuery(), limit=10**6)]
    assert len(rows) == len(set(rows))
    assert durable - {""} <= set(rows)
    assert not (tmp_path / "spool" / REJECTED).exists()
    ledger.close()
