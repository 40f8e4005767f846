"""Copy a process's output, which Ray redirects to files, to another output such as the container's.

Problem: a replica's standard output and error are files in Ray's session folder on the pod's disk. `kubectl logs` does
not show these files, and they are lost with the pod. Ray 2.60 redirects the output in its core worker
(RedirectStdoutOncePerProcess). With RAY_LOG_TO_STDERR=1 a node would write no files, but the files are needed by Ray's
dashboard, by `ray logs` and by end_causes.py, which finds out why an engine ended.

So a thread copies the whole lines that this process and its children append to the files. Lines of Headrace's log are
copied unchanged. Every other line, for example of vLLM's log, becomes the text of an event `worker.output`. The thread
falls behind if the output is slow. If it is more than MAX_LAG_BYTES behind, it skips lines.
"""

from __future__ import annotations

import json
import os
import select
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from cluster.observe.line_writer import STDERR, STDOUT
from cluster.observe.log import add_flush

PATH_VARIABLE = "HEADRACE_LOG_COPY"
"""Environment variable with the path of the output to copy to, e.g. /proc/1/fd/1, the container's standard output."""
POLL_S = 0.25
CHUNK_BYTES = 256 << 10
MAX_LINE_BYTES = 64 << 10
MAX_LAG_BYTES = 16 << 20
_RAY_MARKS = (b":job_id:", b":actor_name:", b":task_name:")
"""Prefixes of lines that mark for Ray's log monitor which job, actor or task writes the next lines."""

log = structlog.get_logger("log")


class FollowedFile:
    """Reader of the lines that are appended to a file after the reader is created. If the file is replaced or
    truncated, the reader begins at the start of the new content."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        self._at = self._file.seek(0, os.SEEK_END)
        self._rest = b""

    def pop_lines(self) -> tuple[list[bytes], int]:
        """Return the next whole lines, without newlines, and the number of bytes that were skipped before these
        lines."""
        size = self._reopen_if_replaced()
        skipped = 0
        if size - self._at > MAX_LAG_BYTES:
            skipped = size - self._at - CHUNK_BYTES
            self._at, self._rest = self._at + skipped, b""
            self._file.seek(self._at)
        data = self._file.read(CHUNK_BYTES)
        self._at += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            lines.append(self._rest)
            self._rest = b""
        return (lines[1:] if skipped else lines), skipped

    def _reopen_if_replaced(self) -> int:
        """Open the file again if it was replaced or truncated. Returns the size of the file at the path."""
        try:
            now = self._path.stat()
        except OSError:
            return self._at
        if now.st_ino != os.fstat(self._file.fileno()).st_ino or now.st_size < self._at:
            self._file.close()
            self._file, self._at, self._rest = self._path.open("rb"), 0, b""
        return now.st_size


class OutputCopy:
    """Follows files and copies each appended line to a descriptor, in its own thread."""

    def __init__(self, files: Mapping[str, FollowedFile], descriptor: int, fields: Mapping[str, str]) -> None:
        """`files`: for `stdout` and `stderr`, the file to which the stream is redirected. `descriptor`: the file
        descriptor to which lines are copied. `fields`: added to lines that are not from Headrace's log."""
        self._files = files
        self._descriptor = descriptor
        self._fields = fields
        self._passes = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-copy", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after it has copied the lines that are in the files now."""
        self._stop.set()
        self._thread.join()

    def flush(self, timeout_s: float) -> bool:
        """Copy all lines that the followed files contain now and that were not copied yet. Returns False if the output
        accepts nothing for `timeout_s` seconds."""
        if not self._passes.acquire(timeout=timeout_s):
            return False
        try:
            return self._copy(timeout_s)
        finally:
            self._passes.release()

    def _run(self) -> None:
        while not self._stop.wait(POLL_S):
            with self._passes:
                self._copy(POLL_S)
        with self._passes:
            self._copy(POLL_S)

    def _copy(self, patience_s: float) -> bool:
        """Copy lines until none is left. Returns False if the output fails. `patience_s`: when the process ends, an
        output that accepts no bytes for this many seconds counts as failed."""
        while lines := list(self._next_lines()):
            if not all(self._write(piece, patience_s) for piece in _pieces(lines)):
                return False
        return True

    def _next_lines(self) -> Iterator[bytes]:
        for stream, file in self._files.items():
            lines, skipped = file.pop_lines()
            if skipped:
                yield self._own_line({"event": "log.bytes_skipped", "level": "warning", "bytes": skipped})
            for line in lines:
                if not line or line.startswith(_RAY_MARKS):
                    continue
                yield line + b"\n" if _is_event(line) else self._wrapped(stream, line)

    def _wrapped(self, stream: str, line: bytes) -> bytes:
        text = line[:MAX_LINE_BYTES].decode("utf-8", "replace")
        return self._own_line({"event": "worker.output", "level": "info", "stream": stream, "text": text})

    def _own_line(self, event: Mapping[str, Any]) -> bytes:
        stamp = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        return json.dumps({**self._fields, **event, "timestamp": stamp}).encode() + b"\n"

    def _write(self, data: bytes, patience_s: float) -> bool:
        """Write all bytes. Returns False if the output fails; the remaining bytes are then lost.

        While the process runs, the method waits for the output without a time limit. When the process ends, an output
        that accepts nothing for `patience_s` seconds counts as failed.
        """
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._descriptor, view) :]
            except BlockingIOError:
                if not select.select((), (self._descriptor,), (), patience_s)[1] and self._is_ending():
                    return False
            except OSError:
                return False
        return True

    def _is_ending(self) -> bool:
        return self._stop.is_set() or threading.current_thread() is not self._thread


def _pieces(lines: Sequence[bytes]) -> Iterator[bytes]:
    """Join lines into pieces that a pipe accepts in one write, so that the lines of several processes do not mix. A
    line that is too long for one write is yielded alone."""
    piece = b""
    for line in lines:
        if len(piece) + len(line) > select.PIPE_BUF and piece:
            yield piece
            piece = b""
        piece += line
    yield piece


def _is_event(line: bytes) -> bool:
    """Return whether a line is from Headrace's log."""
    if not (line.startswith(b"{") and line.endswith(b"}")):
        return False
    try:
        return "event" in json.loads(line)
    except ValueError:
        return False


def copy_output(path: str, fields: Mapping[str, str], file_of: Callable[[int], str]) -> OutputCopy | None:
    """Copy this process's standard output and error to `path` from now on, if they are redirected to files.

    `path`: the output to copy to; "" for no copy. `fields`: added to lines that are not from Headrace's log. `file_of`:
    returns the file to which a descriptor of this process is redirected, or "" if it is not redirected to a file.
    Returns None if nothing is copied. If the output at `path` cannot be opened, the error is logged.
    """
    files = {name: file for name, number in (("stdout", STDOUT), ("stderr", STDERR)) if (file := file_of(number))}
    if not path or not files:
        return None
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        log.warning("log.copy_failed", path=path, error=str(error))
        return None
    copy = OutputCopy({name: FollowedFile(Path(file)) for name, file in files.items()}, descriptor, fields)
    copy.start()
    add_flush(copy.flush)
    return copy
