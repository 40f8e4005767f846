"""Logging as JSON lines. A line has the time in UTC, the level, the name of the event (events.py) and its fields.

Lines are written by a thread (line_writer.py), so a slow reader of the output never blocks the event loop.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, MutableMapping
from contextvars import ContextVar, Token
from datetime import UTC, datetime
from functools import partial
from typing import Any

import structlog

from cluster.observe.line_writer import STDERR, Event, LineWriter

MAX_FIELD_CHARS = 8192
"""Longest text of one field of a line; the rest is cut off."""
END_S = 2.0
"""Longest wait in seconds, at the end of the process, until the last lines are written."""

_CALL: ContextVar[Mapping[str, str]] = ContextVar("call_fields")
_CHILDREN = "HEADRACE_LOG_SETTINGS"
"""Environment variable that passes the settings of the log to child processes, as JSON."""
_NO_CALL: Mapping[str, str] = {}
_at_flush: list[Callable[[float], object]] = []
_writers: list[LineWriter] = []


def configure(level: str, fields: Mapping[str, str], *, descriptor: int = STDERR) -> LineWriter:
    """Configure structlog for this process, and for its child processes that call `configure_as_parent`. Returns the
    writer of the lines.

    `fields`: added to every line. `descriptor`: the file descriptor to which the lines are written.
    """
    os.environ[_CHILDREN] = json.dumps({"level": level, "descriptor": descriptor, "fields": dict(fields)})
    writer = LineWriter(descriptor, render=partial(_render, fields), dropped_event=_dropped_event)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            _stamp,
            structlog.processors.format_exc_info,
            _as_argument,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=lambda *_: writer,
        cache_logger_on_first_use=True,
    )
    if not _at_flush:
        atexit.register(flush)
    _at_flush.insert(0, writer.flush)
    _writers.append(writer)
    return writer


def configure_as_parent() -> None:
    """Configure structlog with the settings of the parent process. Does nothing if the parent has not called
    `configure`."""
    if text := os.environ.get(_CHILDREN, ""):
        settings = json.loads(text)
        configure(settings["level"], settings["fields"], descriptor=settings["descriptor"])


def flush(timeout_s: float = END_S) -> None:
    """Wait until all lines are written, at most `timeout_s` seconds for each output. Call this function before a
    process ends without running its exit handlers."""
    for waits in _at_flush:
        waits(timeout_s)


def dropped_lines() -> int:
    """Return the number of lines that this process has dropped, because the log's reader was too slow or the disk was
    full."""
    return sum(writer.dropped for writer in _writers)


def add_flush(waits: Callable[[float], object]) -> None:
    """Register another output that `flush` waits for. `waits(timeout_s)`: waits until the lines of this output are
    written. `flush` calls it after the lines of this process are written."""
    _at_flush.append(waits)


class CallFields:
    """Context manager for code that handles one call. Inside the context, `call_fields()` returns `fields`, the log
    fields of the call, to all code in the same task.

    This is a class because it is entered for every call: a generator with `contextmanager` would take three times as
    long.
    """

    __slots__ = ("_fields", "_token")
    _token: Token[Mapping[str, str]]

    def __init__(self, fields: Mapping[str, str]) -> None:
        self._fields = fields

    def __enter__(self) -> None:
        self._token = _CALL.set(self._fields)

    def __exit__(self, *_: object) -> None:
        _CALL.reset(self._token)


def call_fields() -> Mapping[str, str]:
    """Return the request id and trace id of the call to which the current task belongs; empty outside of calls.

    Do not use these ids in a task that serves several calls: they are the ids of the call that started the task.
    """
    return _CALL.get(_NO_CALL)


def ids_of_call(request_id: str, trace_id: str) -> dict[str, str]:
    """Return the fields that every line about a call has: the request id and, unless it is "", the trace id."""
    return {"request_id": request_id, "trace_id": trace_id} if trace_id else {"request_id": request_id}


def _stamp(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event["timestamp"] = time.time()
    return event


def _as_argument(_: Any, __: str, event: MutableMapping[str, Any]) -> tuple[tuple[MutableMapping[str, Any]], Event]:
    """Return the arguments with which structlog calls the writer: only the event."""
    return (event,), {}


def _dropped_event(dropped: int) -> Event:
    return {"event": "log.lines_dropped", "lines": dropped, "level": "warning", "timestamp": time.time()}


def _render(fields: Mapping[str, str], event: Event) -> str:
    """Return the line of an event: a JSON object with the event's own fields and `fields`. Long texts are cut."""
    whole = {**fields, **event}
    for name, value in whole.items():
        if type(value) is str and len(value) > MAX_FIELD_CHARS:
            whole[name] = f"{value[:MAX_FIELD_CHARS]}... ({len(value)} characters)"
    whole["timestamp"] = datetime.fromtimestamp(event["timestamp"], UTC).isoformat().replace("+00:00", "Z")
    try:
        return json.dumps(whole, default=repr)
    except (TypeError, ValueError, RecursionError) as error:  # a value that refers to itself, a key that is no text
        plain = {"event": str(event.get("event")), "error": f"its fields are no JSON: {error}"}
        return json.dumps({**fields, **plain, "timestamp": whole["timestamp"]})


def keep_handlers_open(logger: logging.Logger) -> None:
    """Make the handlers of a logger ignore `close` until the process ends.

    vLLM calls logging.dictConfig, which closes all handlers, including the handler of Ray Serve's log file. With that
    handler closed, this replica could not report its log file to a restarted Serve controller, and the controller would
    replace the replica."""
    for handler in logger.handlers:
        handler.close = handler.flush  # type: ignore[method-assign]
