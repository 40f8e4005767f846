"""Asynchronous writer of audit events to the audit file and the audit table, with a rate limit.

A caller that guesses keys causes one failure event per request. So `write` does not block, and the list of waiting
events is bounded. At most `per_second` authentication failures and policy decisions are written per second. Further
events of the same second are only counted: one summary event is written per kind, action and outcome. Admin actions are
never rate-limited.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from cluster.ledger.audit.audit import AuditEvent, AuditLog
from cluster.ledger.errors import LedgerError

log = structlog.get_logger("audit")

PER_SECOND = 50
MAX_WAITING = 10_000
PERIOD_S = 0.5
Insert = Callable[[Sequence[AuditEvent]], None]


@dataclass(frozen=True, slots=True)
class AuditStatistics:
    """Numbers of audit events, and the last error.

    `written` events are in the file. `suppressed` events are only counted in a summary. `waiting` events are not in
    the table yet. `lost` events are in the file but not in the table, because the list of waiting events was full or
    because the table rejected the events.
    """

    written: int
    suppressed: int
    waiting: int
    lost: int
    error: str


class AuditWriter:
    """Writer thread of audit events. `insert` is `Ledger.audit.insert`, or None without a database."""

    def __init__(
        self,
        file: AuditLog,
        insert: Insert | None = None,
        *,
        per_second: int = PER_SECOND,
        period_s: float = PERIOD_S,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = file
        self._insert = insert
        self._per_second = per_second
        self._period_s = period_s
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._fresh: list[AuditEvent] = []
        self._window = -1
        self._in_window = 0
        self._suppressed_events: dict[tuple[str, str, str], tuple[int, AuditEvent]] = {}
        self._waiting: list[AuditEvent] = []
        self._written = self._suppressed = self._lost = 0
        self._error = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def write(self, event: AuditEvent) -> None:
        """Queue an event for the thread. The call never waits for the disk or the database."""
        with self._lock:
            if event.kind == "admin" or self._within_limit():
                self._fresh.append(event)
                return
            self._suppressed += 1
            name = (event.kind, event.action, event.outcome)
            count, first = self._suppressed_events.get(name, (0, event))
            self._suppressed_events[name] = (count + 1, first)

    def _within_limit(self) -> bool:
        window = int(self._monotonic())
        if window != self._window:
            self._window, self._in_window = window, 0
            self._fresh += self._summary()
        self._in_window += 1
        return self._in_window <= self._per_second

    def _summary(self) -> list[AuditEvent]:
        events = [
            AuditEvent(
                first.at_s, first.kind, first.action, outcome=first.outcome, reason=f"{count} more like it in a second"
            )
            for count, first in self._suppressed_events.values()
        ]
        self._suppressed_events = {}
        return [dataclasses.replace(event, details={"suppressed": True}) for event in events]

    def statistics(self) -> AuditStatistics:
        """Return the current numbers of events, and the last error."""
        with self._lock:
            waiting = len(self._waiting) + len(self._fresh)
            return AuditStatistics(self._written, self._suppressed, waiting, self._lost, self._error)

    def close(self, timeout_s: float = 5.0) -> None:
        """Write queued events and end the thread."""
        self._stop.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            self.flush()
        with self._lock:
            self._fresh += self._summary()
        self.flush()

    def flush(self) -> None:
        """Write queued events in the caller's thread. Events that the database did not accept are inserted later."""
        with self._flushing:
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            fresh, self._fresh = self._fresh, []
        error = ""
        for event in fresh:
            try:
                self._file.write(event)
                self._written += 1
            except OSError as failure:
                error = f"the audit file cannot be written: {failure}"
        if self._insert is not None:
            error = self._insert_waiting(fresh) or error
        if error and error != self._error:
            log.error("audit.not_written", error=error)
        self._error = error

    def _insert_waiting(self, fresh: Sequence[AuditEvent]) -> str:
        assert self._insert is not None
        with self._lock:
            self._waiting += fresh
            self._lost += max(len(self._waiting) - MAX_WAITING, 0)
            self._waiting = self._waiting[-MAX_WAITING:]
            batch = list(self._waiting)
        if not batch:
            return ""
        try:
            self._insert(batch)
        except LedgerError as error:
            return str(error)
        except Exception as error:  # a batch that the table rejects must not block all later ones
            log.exception("audit.batch_refused")
            with self._lock:
                self._waiting = self._waiting[len(batch) :]
                self._lost += len(batch)
            return f"{type(error).__name__}: {error}"
        with self._lock:
            self._waiting = self._waiting[len(batch) :]
        return ""
