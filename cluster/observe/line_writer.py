"""Writer of log lines. Callers put events into a bounded queue, and a thread writes them as lines to a file descriptor.

Problem: a process writes its log to a pipe whose reader may be slow or stopped, or to a disk that may be full. A direct
write would then block the event loop. The thread also renders the events: rendering several lines in a row takes a
third of the CPU time that the same lines would take between other work. Invariants: `write` never waits for the output.
The waiting events take at most about `max_bytes`. Further events are dropped, and their number is logged when the queue
has room again. Lines stay whole and in order.
"""

from __future__ import annotations

import os
import queue
import select
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

STDOUT, STDERR = 1, 2
MAX_PENDING_BYTES = 4 << 20
EVENT_BYTES = 512
"""Estimated size in bytes of a waiting event without the traceback, which is the longest text of an event."""
BATCH_BYTES = 64 << 10
GATHER_S = 0.05
"""Seconds for which the thread sleeps after a write. Events that are queued meanwhile do not wake the thread."""
Event = Mapping[str, Any]
PAUSE_S = 0.5
"""Seconds between two tries to write to an output that fails, such as a file on a full disk."""
MAX_FAILURES = 3
"""Number of failed tries in a row after which a batch of events is dropped. The writer then tries the next batch."""


class LineWriter:
    """Writer of events to one file descriptor. As structlog's logger, it has a method for each log level."""

    def __init__(
        self,
        descriptor: int,
        *,
        render: Callable[[Event], str],
        dropped_event: Callable[[int], Event],
        max_bytes: int = MAX_PENDING_BYTES,
    ) -> None:
        """Create a writer to the file descriptor `descriptor`. `render`: returns the line of an event, without a
        newline; it must not raise. `dropped_event`: takes a number of dropped events, and returns the event that
        reports it. `max_bytes`: approximate bound on the waiting events."""
        self._descriptor = descriptor
        self._render = render
        self._dropped_event = dropped_event
        self._max_bytes = max_bytes
        self.dropped = 0
        """Number of events that were dropped since the start."""
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        """Begin with an empty queue and without a thread. Also called in a forked process, because the fork does not
        copy the thread."""
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Event | threading.Event] = queue.SimpleQueue()
        self._pending_bytes = 0
        self._dropped = 0
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()

    def __repr__(self) -> str:
        return f"<LineWriter to {self._descriptor} pending {self._pending_bytes} bytes>"

    def write(self, event: Event) -> None:
        """Queue an event, which the caller must not change afterwards. The event is dropped if too many events wait."""
        size = _size(event)
        with self._lock:
            if self._pending_bytes + size > self._max_bytes:
                self._dropped += 1
                self.dropped += 1
                return
            self._pending_bytes += size
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()
        self._queue.put(event)

    debug = info = warning = error = critical = msg = write

    def flush(self, timeout_s: float) -> bool:
        """Wait until the events that are queued now are written. Returns False if `timeout_s` passes first."""
        if self._thread is None:
            return True
        reached = threading.Event()
        self._queue.put(reached)
        self._hurry.set()
        return reached.wait(timeout_s)

    def _run(self) -> None:
        while True:
            batch, reached = self._next_batch()
            if batch:
                kept = self._write_all(
                    "".join([self._render(event) + "\n" for event in batch]).encode("utf-8", "replace")
                )
                with self._lock:
                    self._pending_bytes -= sum(map(_size, batch))
                    if not kept:
                        self._dropped += len(batch)
                        self.dropped += len(batch)
            self._report_dropped()
            for event in reached:
                event.set()
            self._hurry.wait(GATHER_S)
            self._hurry.clear()

    def _next_batch(self) -> tuple[list[Event], list[threading.Event]]:
        """Wait for an event or a call of `flush`. Returns the waiting events, and one flag for each waiting call of
        `flush`. The caller must set these flags after it has written the events."""
        batch: list[Event] = []
        reached: list[threading.Event] = []
        size, item = 0, self._queue.get()
        while True:
            if isinstance(item, threading.Event):
                reached.append(item)
            else:
                batch.append(item)
                size += _size(item)
            if size >= BATCH_BYTES:
                return batch, reached
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return batch, reached

    def _report_dropped(self) -> None:
        with self._lock:
            dropped, self._dropped = self._dropped, 0
        if dropped and not self._write_all(f"{self._render(self._dropped_event(dropped))}\n".encode()):
            with self._lock:
                self._dropped += dropped

    def _write_all(self, data: bytes) -> bool:
        """Write bytes. Returns False if the output has failed several times in a row."""
        view, failures = memoryview(data), 0
        while view and failures < MAX_FAILURES:
            try:
                view = view[os.write(self._descriptor, view) :]
                failures = 0
            except BlockingIOError:  # another process with the same output has made it non-blocking
                select.select((), (self._descriptor,), (), PAUSE_S)
            except OSError:
                failures += 1
                time.sleep(PAUSE_S)
        return not view


def _size(event: Event) -> int:
    """Return the estimated size of an event in bytes."""
    return EVENT_BYTES + len(event.get("exception", ""))
