"""Access snapshots of a gateway: tenants and keys, polled from the database every half second and on demand.

A copy of the newest snapshot is on disk.

While the database is unreachable, the gateway uses the last snapshot, so that callers can still authenticate. The last
snapshot is used for at most `stale_after_s` seconds, because it still accepts keys that were revoked during the outage.
The age of a snapshot counts from the last successful poll. Within a process, the monotonic clock measures the age, so a
step of the wall clock does not change the age. Across a restart, the wall clock measures the age. A daemon thread polls
the database. Readers get a reference to an immutable snapshot.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from cluster.api.outcomes import CallError, Outcome
from cluster.ledger.errors import LedgerError
from cluster.ledger.files import write_atomically
from cluster.policy.tenants.identity import AccessSnapshot
from cluster.policy.tenants.policy import TenantPolicy

log = structlog.get_logger("ledger")

FORMAT = "headrace-snapshot/1"
PERIOD_S = 0.5
MAX_REFRESH_S = 30.0
Read = Callable[[AccessSnapshot | None], AccessSnapshot]


def save(path: Path, snapshot: AccessSnapshot) -> None:
    """Write a snapshot to a file atomically. Only the file's owner can read and write the file. Raises OSError."""
    body = json.dumps(snapshot.as_json(), separators=(",", ":")).encode()
    head = json.dumps({"format": FORMAT, "sha256": hashlib.sha256(body).hexdigest()}).encode()
    write_atomically(path, head + b"\n" + body)


def load(path: Path) -> AccessSnapshot | None:
    """Read a saved snapshot. Returns None if the file is missing, damaged or in another release's format."""
    try:
        head, _, body = path.read_bytes().partition(b"\n")
        header = json.loads(head)
        if header["format"] != FORMAT or header["sha256"] != hashlib.sha256(body).hexdigest():
            raise ValueError("its checksum or format does not match")
        return AccessSnapshot.from_json(json.loads(body))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("ledger.snapshot_not_loaded", path=str(path), error=str(error))
        return None


@dataclass(frozen=True, slots=True)
class WatchStatistics:
    """State of a Watcher.

    `age_s` is the time since the last successful poll in seconds, or infinite if no poll has succeeded. `error` is the
    error of the last poll, or empty if the last poll succeeded.
    """

    sequence: int
    age_s: float
    tenants: int
    keys: int
    error: str


class Watcher:
    """Thread that polls the database for the newest snapshot of tenants and keys. `read`: reads the snapshot.

    `declared` has the tenants of the configuration file. Declared tenants override the database's tenants, even while
    the database is unreachable. `on_change` is called with every changed snapshot, in the poller's thread.
    """

    def __init__(
        self,
        read: Read,
        file: Path,
        *,
        stale_after_s: float,
        declared: Sequence[TenantPolicy] = (),
        on_change: Callable[[AccessSnapshot], None] | None = None,
        period_s: float = PERIOD_S,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._file = file
        self._stale_after_s = stale_after_s
        self._refresh_s = min(MAX_REFRESH_S, stale_after_s / 4)
        self._declared = tuple(declared)
        self._on_change = on_change
        self._period_s = period_s
        self._monotonic = monotonic
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._error = ""
        self._saved_at = -float("inf")
        saved = load(file)
        self._stored = saved
        self._view = (saved or AccessSnapshot()).with_declared(self._declared)
        # the monotonic clock's time when the snapshot was last known to be the newest
        self._confirmed = monotonic() - max(wall() - saved.taken_at_s, 0.0) if saved else -float("inf")

    def current(self) -> AccessSnapshot:
        """Return the newest snapshot.

        Raises CallError if the database has been unreachable for longer than `stale_after_s`.
        """
        age_s = self._monotonic() - self._confirmed
        if age_s > self._stale_after_s:
            raise CallError(Outcome.STORE_UNAVAILABLE, self._stale_message(age_s))
        return self._view

    def _stale_message(self, age_s: float) -> str:
        if age_s == float("inf"):
            return "this gateway has not reached its database yet and cannot check API keys; retry shortly"
        return (
            f"this gateway's database has been unreachable for {age_s:.0f} s, longer than store.stale_after_s "
            f"({self._stale_after_s:g} s) allows API keys to be accepted; retry shortly"
        )

    def statistics(self) -> WatchStatistics:
        """Return the size and age of the snapshot, and the last error."""
        view = self._view
        age_s = self._monotonic() - self._confirmed
        return WatchStatistics(view.sequence, age_s, len(view.tenants), len(view.keys), self._error)

    def start(self) -> None:
        """Start the thread that polls the database."""
        self._thread = threading.Thread(target=self._run, name="ledger-watch", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the thread. A thread that still waits for the database after `timeout_s` seconds is left running."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def poll_soon(self) -> None:
        """Make the thread poll without waiting for the end of its period. Thread-safe; returns at once."""
        self._wake.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()  # before the poll, so that a change during the poll causes another one
            if self._stop.is_set():
                return
            self.poll()
            self._wake.wait(self._period_s)

    def poll(self) -> bool:
        """Poll the database once, in the caller's thread. Returns whether the database has answered."""
        began = self._monotonic()
        try:
            newest = self._read(self._stored)
        except LedgerError as error:
            self._record_error(str(error))
            return False
        except Exception as error:  # polling must continue after any error
            log.exception("ledger.snapshot_not_read")
            self._record_error(f"{type(error).__name__}: {error}")
            return False
        if self._error:
            log.info("ledger.snapshot_recovered", sequence=newest.sequence)
        self._error = ""
        self._confirmed = began
        self._update(newest)
        return True

    def _record_error(self, error: str) -> None:
        if error != self._error:
            log.warning("ledger.snapshot_not_read", error=error)
        self._error = error

    def _update(self, newest: AccessSnapshot) -> None:
        before, self._stored = self._stored, newest
        changed = before is None or before.tenants is not newest.tenants
        if changed:
            self._view = newest.with_declared(self._declared)
            if self._on_change is not None:
                self._on_change(self._view)
        if changed or self._monotonic() - self._saved_at >= self._refresh_s:
            try:
                save(self._file, newest)
                self._saved_at = self._monotonic()
            except OSError as error:  # the snapshot is still served from memory; saving is retried
                log.warning("ledger.snapshot_not_saved", path=str(self._file), error=str(error))
