"""The spool: usage records are written to local files first, then to the database, exactly once despite crashes.

No record is lost: a record is *durable* once the record's line is fsynced. The gateway acknowledges only durable
records, and the worker keeps its copy until the acknowledgement. A segment file is deleted only after the database has
committed all records of the segment. So a durable record is always in a segment or in the database.

No record is stored twice: after a crash between commit and deletion the segment is replayed, and the database stores
each record id once.

Damaged lines: each line has a checksum. A last line without a newline belongs to a write that was never fsynced, and
so never acknowledged; such a line is dropped. A later process never appends to an old segment, so a torn line stays
the last line of the segment. Records that the database rejects permanently go to `rejected.jsonl` and are counted,
because an invalid record must not block all later records.

On the hot path, a caller only appends a reference to a list. One thread encodes, writes and fsyncs the records in
batches.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
import structlog

from cluster.ledger.errors import StoreUnavailable
from cluster.ledger.files import sync_folder
from cluster.ledger.usage.records import RecordError, UsageRecord
from cluster.process.private_files import make_private_folder

log = structlog.get_logger("ledger")

LINGER_S = 0.005
MAX_SEGMENT_BYTES = 16 * 1024 * 1024
REJECTED = "rejected.jsonl"
_SEGMENT = "usage-{:012}.jsonl"


def encode(record: UsageRecord) -> bytes:
    """Encode a record as one line: checksum, space, JSON."""
    body = orjson.dumps(record.as_json())
    return b"%08x %s\n" % (zlib.crc32(body), body)


def decode(line: bytes) -> UsageRecord:
    """Decode a line of the spool into a usage record. `line` is without its newline. Raises ValueError."""
    checksum, _, body = line.partition(b" ")
    if len(checksum) != 8 or int(checksum, 16) != zlib.crc32(body):
        raise ValueError("the checksum does not match")
    return UsageRecord.from_json(orjson.loads(body))


@dataclass(frozen=True, slots=True)
class SpoolStatistics:
    """State of a spool.

    `written` is the number of records appended since the spool was opened. `durable` is how many of the written
    records are fsynced. `pending` is the number of records that are not in the database yet.
    `oldest_at_s` is the modification time of the oldest segment file, or the time since which no record could be
    written if that is earlier, in seconds since the epoch; None without either. `error` is the last failure.
    """

    written: int
    durable: int
    pending: int
    rejected: int
    oldest_at_s: float | None
    error: str


class Spool:
    """A folder of segment files. The spool appends records and returns closed segments.

    A lock in the folder makes sure that only one process uses the folder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        on_durable: Callable[[int], None] | None = None,
        linger_s: float = LINGER_S,
        max_segment_bytes: int = MAX_SEGMENT_BYTES,
    ) -> None:
        make_private_folder(folder)
        self._folder = folder
        self._lock_file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_file)
            raise ValueError(f"the spool {folder} is in use by another process: use one folder per process") from None
        self._on_durable = on_durable
        self._linger_s = linger_s
        self._max_segment_bytes = max_segment_bytes
        self._changed = threading.Condition()
        self._waiting: list[UsageRecord] = []
        self._in_write = 0
        """Number of records that are being written: they are neither in `_waiting` nor counted by the segment."""
        self._segment: _Segment | None = None
        self._next = 1 + max((int(path.stem[6:]) for path in self._segments()), default=0)
        self._closed_segments = {path: _count(path) for path in self._segments()}
        self._rejected = _count(folder / REJECTED)
        self._written = self._durable = 0
        self._error = ""
        self._unwritten_since_s: float | None = None
        """When the first of the writes that have failed since the last good one failed, since the epoch."""
        self._closing = False
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="ledger-spool", daemon=True)
        self._thread.start()

    def append(self, record: UsageRecord) -> int:
        """Queue a record. The call never waits for the disk.

        Returns the record's position, which `wait_durable` accepts and `on_durable` reports. Raises ValueError if the
        spool is closed.
        """
        with self._changed:
            if self._closing:
                raise ValueError("the spool is closed")
            self._waiting.append(record)
            self._written += 1
            if len(self._waiting) == 1:
                self._changed.notify_all()
            return self._written

    def wait_durable(self, position: int, timeout_s: float) -> bool:
        """Wait until the record at a position is on disk. Returns False if the record is not on disk after `timeout_s`
        seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._durable >= position, timeout_s)

    def statistics(self) -> SpoolStatistics:
        """Return the numbers of records by state, the age of the oldest segment, and the last error."""
        with self._changed:
            in_open_segment = self._segment.records if self._segment else 0
            pending = sum(self._closed_segments.values()) + in_open_segment + self._in_write + len(self._waiting)
            paths = [*self._closed_segments, *([self._segment.path] if self._segment else [])]
            times = [_modified_at(path) for path in paths]
            oldest = min(
                [*times, *([] if self._unwritten_since_s is None else [self._unwritten_since_s])], default=None
            )
            return SpoolStatistics(self._written, self._durable, pending, self._rejected, oldest, self._error)

    def close(self) -> None:
        """Write queued records, end the thread and unlock the folder.

        Records that are not in the database yet stay in the folder.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self.roll()
        os.close(self._lock_file)

    def roll(self) -> list[Path]:
        """Close the current segment, if there is a current segment. Returns all closed segments, oldest first."""
        with self._writing, self._changed:
            segment, self._segment = self._segment, None
            if segment is not None:
                segment.close()
                self._closed_segments[segment.path] = segment.records
            return sorted(self._closed_segments)

    def forget(self, path: Path) -> None:
        """Delete a closed segment. Call this method only after the database has committed the segment's records."""
        path.unlink()
        sync_folder(self._folder)
        with self._changed:
            del self._closed_segments[path]

    def reject(self, line: bytes, why: str) -> None:
        """Append to `rejected.jsonl` a line that can never be stored, and fsync the file. Raises OSError."""
        text = json.dumps({"why": why, "line": line.decode("utf-8", "replace")}) + "\n"
        handle = os.open(self._folder / REJECTED, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(handle, text.encode())
            os.fsync(handle)
        finally:
            os.close(handle)
        with self._changed:
            self._rejected += 1
        log.error("usage.record_rejected", reason=why)

    def _segments(self) -> list[Path]:
        return sorted(self._folder.glob("usage-*.jsonl"))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                # wait briefly for more records, so that several records share one fsync
                self._changed.wait_for(lambda: self._closing, self._linger_s)
                batch, self._waiting = self._waiting, []
                self._in_write = len(batch)
            if not self._write(batch):
                with self._changed:
                    self._waiting[:0] = batch
                    self._in_write = 0
                    if self._closing:
                        return  # visible in statistics; an unacknowledged worker reports to another gateway
                    self._changed.wait_for(lambda: self._closing, 1.0)

    def _write(self, batch: Sequence[UsageRecord]) -> bool:
        try:
            with self._writing:
                segment = self._open_segment()
                segment.write(b"".join(map(encode, batch)))
                with self._changed:  # before another thread can close the segment
                    segment.records += len(batch)
                    self._in_write = 0
                    self._durable += len(batch)
                    self._error, self._unwritten_since_s = "", None
                    position = self._durable
                    self._changed.notify_all()
        except OSError as error:
            self._abandon_segment(str(error))
            return False
        if self._on_durable is not None:
            self._on_durable(position)
        if segment.size >= self._max_segment_bytes:
            self.roll()
        return True

    def _open_segment(self) -> _Segment:
        if self._segment is None:
            self._segment = _Segment(self._folder / _SEGMENT.format(self._next))
            self._next += 1
            sync_folder(self._folder)
        return self._segment

    def _abandon_segment(self, error: str) -> None:
        """Close the segment after a failed write. The last line may be torn, so no line may be appended."""
        log.error("usage.spool_not_written", error=error)
        with self._writing, self._changed:
            self._error, self._unwritten_since_s = error, self._unwritten_since_s or time.time()
            segment, self._segment = self._segment, None
            if segment is not None:
                segment.close()
                self._closed_segments[segment.path] = segment.records


class _Segment:
    """The segment file that is being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.records = 0
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._handle, view) :]
        os.fsync(self._handle)
        self.size += len(data)

    def close(self) -> None:
        os.close(self._handle)


def _count(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _modified_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()


class Replayer:
    """Thread that moves usage records from the spool's closed segments (files that are no longer written) into
    the database.

    `insert` is `Ledger.usage.insert`, which writes all of the given records or none, and stores each record id
    once. `insert` raises StoreUnavailable while the database is unreachable.
    """

    def __init__(
        self,
        spool: Spool,
        insert: Callable[[Sequence[UsageRecord]], object],
        *,
        period_s: float = 0.5,
        max_pause_s: float = 10.0,
        batch_records: int = 500,
    ) -> None:
        self._spool = spool
        self._insert = insert
        self._period_s = period_s
        self._max_pause_s = max_pause_s
        self._batch_records = batch_records
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread that moves records."""
        self._thread = threading.Thread(target=self._run, name="ledger-replay", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the thread. Records that are not in the database yet stay in the spool."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        pause_s = self._period_s
        while not self._stop.wait(pause_s):
            try:
                self.replay()
                pause_s = self._period_s
            except (StoreUnavailable, OSError) as error:
                pause_s = min(pause_s * 2, self._max_pause_s)
                log.warning("usage.insert_delayed", error=str(error), pending=self._spool.statistics().pending)

    def replay(self) -> int:
        """Move all records of the spool into the database. Returns the number of moved records.

        Raises StoreUnavailable, OSError.
        """
        moved = 0
        for path in self._spool.roll():
            for batch in self._batches(path):
                self._insert_valid(batch)
                moved += len(batch)
            self._spool.forget(path)
        return moved

    def _batches(self, path: Path) -> Iterator[list[UsageRecord]]:
        batch: list[UsageRecord] = []
        *lines, _torn = path.read_bytes().split(b"\n")
        for line in lines:
            try:
                batch.append(decode(line))
            except (ValueError, RecordError) as error:
                self._spool.reject(line, str(error))
            if len(batch) >= self._batch_records:
                yield batch
                batch = []
        if batch:
            yield batch

    def _insert_valid(self, batch: Sequence[UsageRecord]) -> None:
        try:
            self._insert(batch)
        except StoreUnavailable:
            raise
        except Exception as error:  # the database rejects a record: find the record by bisection, insert the others
            if len(batch) == 1:
                self._spool.reject(encode(batch[0]), f"{type(error).__name__}: {error}")
                return
            middle = len(batch) // 2
            self._insert_valid(batch[:middle])
            self._insert_valid(batch[middle:])
