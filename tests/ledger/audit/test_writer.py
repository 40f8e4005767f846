"""Tests of the audit writer. It loses no admin action. Many authentication failures per second fill neither the audit
file nor the audit table of the database."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from cluster.ledger.audit import writer as audit_writer
from cluster.ledger.audit.audit import AuditEvent, AuditLog
from cluster.ledger.audit.writer import AuditWriter
from cluster.ledger.errors import StoreUnavailable

pytestmark = pytest.mark.slow


class Table:
    """Fake audit table. Inserts fail while `failure` is set."""

    def __init__(self) -> None:
        self.rows: dict[str, AuditEvent] = {}
        self.failure: Exception | None = None
        self.meanwhile: Callable[[], None] | None = None
        """Function that is called once, while the next batch is being inserted."""

    def insert(self, events: Sequence[AuditEvent]) -> None:
        """Insert events. Each event id is stored once."""
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        if self.failure is not None:
            raise self.failure
        self.rows |= {event.event_id: event for event in events}


@pytest.fixture
def table() -> Table:
    """A fake audit table."""
    return Table()


@pytest.fixture
def make(tmp_path: Path, table: Table) -> Iterator[Callable[..., AuditWriter]]:
    """Provide a function that creates audit writers, which all write to one file.

    The clock of a writer is constant, and its thread writes only when the writer is closed.
    """
    writers: list[AuditWriter] = []

    def make_writer(**options: object) -> AuditWriter:
        arguments: dict[str, object] = {"period_s": 3600.0, "monotonic": lambda: 5.5, **options}
        writers.append(AuditWriter(AuditLog(tmp_path / "a.jsonl"), table.insert, **arguments))  # type: ignore[arg-type]
        return writers[-1]

    yield make_writer
    for writer in writers:
        writer.close()


def failure(number: int = 0) -> AuditEvent:
    """Return the event of a failed authentication."""
    return AuditEvent(float(number), "auth_failure", "authenticate", outcome="unknown", source=f"10.0.0.{number}")


def lines(tmp_path: Path) -> list[dict[str, object]]:
    """Return the events in the audit file."""
    return [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]


def test_events_reach_file_and_table(make: Callable[..., AuditWriter], table: Table, tmp_path: Path) -> None:
    """Every event is written to the file once and to the table once, in order."""
    writer = make()
    for at in range(5):
        writer.write(failure(at))
    writer.flush()
    writer.flush()
    assert [line["at_s"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4]
    assert len(table.rows) == 5
    assert (writer.statistics().written, writer.statistics().waiting) == (5, 0)


def test_a_flood_becomes_one_line(make: Callable[..., AuditWriter], table: Table, tmp_path: Path) -> None:
    """Of 100,000 failures in a second, the first 10 are written and the rest are counted in one event.

    All admin actions in the same second are written.
    """
    now = [5.5]
    writer = make(per_second=10, monotonic=lambda: now[0])
    for at in range(100_000):
        writer.write(failure(at % 200))
    for _ in range(30):
        writer.write(AuditEvent(1.0, "admin", "keys.create"))
    now[0] = 6.5
    writer.write(failure())
    writer.flush()
    events = lines(tmp_path)
    assert sum(event["kind"] == "admin" for event in events) == 30
    assert sum(event["kind"] == "auth_failure" for event in events) == 12
    assert [event["reason"] for event in events if event["details"]] == ["99990 more like it in a second"]
    assert writer.statistics().suppressed == 99_990
    assert len(table.rows) == 42


def test_acts_that_end_together(make: Callable[..., AuditWriter], table: Table) -> None:
    """No event is lost if several threads write and flush events at the same time, even if one insert fails."""
    writer = make()
    events = [AuditEvent(float(at), "admin", f"a{at}") for at in range(3)]
    threads: list[threading.Thread] = []

    def write_and_flush(event: AuditEvent) -> None:
        writer.write(event)
        writer.flush()

    def meanwhile() -> None:
        for event, failure in ((events[1], None), (events[2], StoreUnavailable("away"))):
            table.failure = failure
            threads.append(threading.Thread(target=write_and_flush, args=(event,)))
            threads[-1].start()
            threads[-1].join(0.1)  # a thread that waits for the lock does not end here
        table.failure = None

    table.meanwhile = meanwhile
    write_and_flush(events[0])
    for thread in threads:
        thread.join()
    writer.flush()
    assert set(table.rows) == {event.event_id for event in events}
    assert (writer.statistics().waiting, writer.statistics().lost) == (0, 0)


def test_what_a_closing_writer_holds_is_written(make: Callable[..., AuditWriter], tmp_path: Path) -> None:
    """Closing a writer writes the waiting events, and an event with the number of suppressed events."""
    writer = make(per_second=1)
    for _ in range(3):
        writer.write(failure())
    writer.close()
    assert [event["reason"] for event in lines(tmp_path)] == ["", "2 more like it in a second"]


def test_a_table_that_is_away_gets_them_later(make: Callable[..., AuditWriter], table: Table, tmp_path: Path) -> None:
    """While the table is unavailable, events are written to the file at once and inserted into the table later.

    If more than MAX_WAITING events wait, the oldest of them are only in the file.
    """
    writer = make(per_second=10**9)
    table.failure = StoreUnavailable("away")
    writer.write(failure(1))
    writer.flush()
    assert (writer.statistics().waiting, writer.statistics().error) == (1, "away")
    for at in range(audit_writer.MAX_WAITING + 4):
        writer.write(failure(at % 200))
    writer.flush()
    assert writer.statistics().lost == 5
    table.failure = None
    writer.flush()
    assert len(table.rows) == audit_writer.MAX_WAITING
    assert len(lines(tmp_path)) == audit_writer.MAX_WAITING + 5
    assert writer.statistics().error == ""


def test_a_refused_batch_does_not_stand_before_others(
    make: Callable[..., AuditWriter], table: Table, tmp_path: Path
) -> None:
    """An event that the database table rejects is written only to the audit file, and the writer's statistics show
    the error.

    Later events are still inserted into the table.
    """
    writer = make()
    table.failure = ValueError("no such column")
    writer.write(failure(1))
    writer.flush()
    assert "no such column" in writer.statistics().error
    table.failure = None
    writer.write(failure(2))
    writer.flush()
    assert [event.at_s for event in table.rows.values()] == [2.0]
    assert (writer.statistics().lost, len(lines(tmp_path))) == (1, 2)


def test_a_disk_that_is_full_is_told(make: Callable[..., AuditWriter], table: Table, tmp_path: Path) -> None:
    """If the file cannot be written, the statistics show the error, and the table still gets the events."""
    (tmp_path / "a.jsonl").mkdir()
    writer = make()
    writer.write(failure())
    writer.flush()
    assert "cannot be written" in writer.statistics().error
    assert len(table.rows) == 1
