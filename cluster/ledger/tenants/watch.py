"""How a gateway knows who may call: the database is asked every half second, and a copy of its answer rests on disk.

While the database is away the last answer serves, since nobody should be locked out by an outage, but no longer than
`stale_after_s`, since a key revoked meanwhile would go on working. Age counts from the last time the database said
"this is the newest": by the wall clock across a restart, by the monotonic clock within a process, so that a step of
the wall clock neither locks everybody out nor keeps an old answer alive. One daemon thread; readers take a reference.
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
from cluster.ledger.files import write_whole
from cluster.policy.tenants.identity import AccessSnapshot
from cluster.policy.tenants.policy import TenantPolicy

log = structlog.get_logger("ledger")

FORMAT = "headrace-snapshot/1"
PERIOD_S = 0.5
MAX_REFRESH_S = 30.0
Read = Callable[[AccessSnapshot | None], AccessSnapshot]


def save(path: Path, snapshot: AccessSnapshot) -> None:
    """Write a snapshot, whole or not at all, readable by its owner only. Raises OSError."""
    body = json.dumps(snapshot.as_json(), separators=(",", ":")).encode()
    head = json.dumps({"format": FORMAT, "sha256": hashlib.sha256(body).hexdigest()}).encode()
    write_whole(path, head + b"\n" + body)


def load(path: Path) -> AccessSnapshot | None:
    """Read what `save` wrote; None when there is none, or it is damaged or of another release's format."""
    try:
        head, _, body = path.read_bytes().partition(b"\n")
        found = json.loads(head)
        if found["format"] != FORMAT or found["sha256"] != hashlib.sha256(body).hexdigest():
            raise ValueError("its checksum or format does not match")
        return AccessSnapshot.from_json(json.loads(body))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("snapshot_unreadable", path=str(path), error=str(error))
        return None


@dataclass(frozen=True, slots=True)
class WatchStatistics:
    """`age_s` since the database last confirmed the snapshot, infinite without one; `error` of the last try."""

    sequence: int
    age_s: float
    tenants: int
    keys: int
    error: str


class Watcher:
    """Keeps the newest snapshot. `read` is `Ledger.snapshots.read`; `declared` are the file's own tenants, which
    stand over the database's even while that is away. `on_change` is called in the watcher's thread."""

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
        self._thread: threading.Thread | None = None
        self._error = ""
        self._saved_at = -float("inf")
        found = load(file)
        self._stored = found
        self._view = (found or AccessSnapshot()).declaring(self._declared)
        # the point of the monotonic clock at which the snapshot was the newest
        self._confirmed = monotonic() - max(wall() - found.taken_at_s, 0.0) if found else -float("inf")

    def current(self) -> AccessSnapshot:
        """The snapshot to decide by. Raises CallError when the database has been away too long."""
        age_s = self._monotonic() - self._confirmed
        if age_s > self._stale_after_s:
            raise CallError(Outcome.STORE_UNAVAILABLE, self._why(age_s))
        return self._view

    def _why(self, age_s: float) -> str:
        if age_s == float("inf"):
            return "this gateway has not reached its database yet and cannot tell who may call; retry shortly"
        return (
            f"this gateway's database has been away for {age_s:.0f} s, longer than store.stale_after_s "
            f"({self._stale_after_s:g}) allows keys to be honoured; retry shortly"
        )

    def statistics(self) -> WatchStatistics:
        """What it knows and how old that is."""
        view = self._view
        age_s = self._monotonic() - self._confirmed
        return WatchStatistics(view.sequence, age_s, len(view.tenants), len(view.keys), self._error)

    def start(self) -> None:
        """Begin to ask."""
        self._thread = threading.Thread(target=self._run, name="ledger-watch", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the thread; one that waits for a silent database is left behind as the daemon it is."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.ask()
            self._stop.wait(self._period_s)

    def ask(self) -> bool:
        """Ask once, in the caller's thread; whether the database has answered."""
        began = self._monotonic()
        try:
            newest = self._read(self._stored)
        except LedgerError as error:
            self._failed(str(error))
            return False
        except Exception as error:  # whatever else is wrong with one answer, the next one is asked for
            log.exception("snapshot_failed")
            self._failed(f"{type(error).__name__}: {error}")
            return False
        if self._error:
            log.info("snapshot_recovered", sequence=newest.sequence)
        self._error = ""
        self._confirmed = began
        self._take(newest)
        return True

    def _failed(self, error: str) -> None:
        if error != self._error:
            log.warning("snapshot_failed", error=error)
        self._error = error

    def _take(self, newest: AccessSnapshot) -> None:
        before, self._stored = self._stored, newest
        changed = before is None or before.tenants is not newest.tenants
        if changed:
            self._view = newest.declaring(self._declared)
            if self._on_change is not None:
                self._on_change(self._view)
        if changed or self._monotonic() - self._saved_at >= self._refresh_s:
            try:
                save(self._file, newest)
                self._saved_at = self._monotonic()
            except OSError as error:  # serves from memory; the next one is tried again
                log.warning("snapshot_not_saved", path=str(self._file), error=str(error))
