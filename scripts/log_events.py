"""The log events in the code: every call of a structlog logger below `cluster/`, found by parsing the source files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEVELS = ("debug", "info", "warning", "error", "exception", "critical")
CALL_FIELDS = ("request_id", "trace_id")
"""Fields that `log_fields` of a call and `call_fields()` add to a line."""
NOTES = ("peer", "reason", "not_logged_before")
"""Fields of the events that the method `_note` in the file LIFETIME logs."""
WORKER_FIELDS = ("worker", "worker_node", "worker_pod", "worker_gpu")
"""Fields that cluster/gateway/links/worker_fields.py adds to a line."""
LIFETIME = "cluster/http2/lifetime.py"
LOGGERS = ("log", "self._log")
MORE = "..."
"""Placeholder for fields whose names are known only when the line is logged."""


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """A place in the code that logs an event. `name` is None if the event's name is not a literal in this place."""

    name: str | None
    level: str
    fields: tuple[str, ...]
    place: str

    @property
    def concerns_call(self) -> bool:
        """Whether the event has the request id of a call."""
        return CALL_FIELDS[0] in self.fields


def logged_events(root: Path = ROOT) -> list[LoggedEvent]:
    """Return every place below `root/cluster` that logs an event, in the order of the files."""
    return [
        event
        for path in sorted((root / "cluster").rglob("*.py"))
        if "log." in (text := path.read_text()) or '"event"' in text
        for event in events_in(text, str(path.relative_to(root)))
    ]


def events_in(text: str, file: str) -> Iterator[LoggedEvent]:
    """Yield every place in a source text that logs an event. `file`: the name of the source file."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Dict):
            yield from _written_by_hand(node, f"{file}:{node.lineno}")
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        method, place = node.func.attr, f"{file}:{node.lineno}"
        if method == "_note" and file == LIFETIME:
            yield from (LoggedEvent(name, "warning", NOTES, place) for name in _names(node))
        elif method in LEVELS and ast.unparse(node.func.value) in LOGGERS:
            level = "error" if method == "exception" else method
            fields = (*_fields(node), *(("exception",) if method == "exception" else ()))
            yield from (LoggedEvent(name, level, fields, place) for name in _names(node))


def _written_by_hand(node: ast.Dict, place: str) -> Iterator[LoggedEvent]:
    """Yield the event in a dict literal that has the keys `event` and `level`. cluster/observe writes such events
    without structlog."""
    items = {
        key.value: value for key, value in zip(node.keys, node.values, strict=True) if isinstance(key, ast.Constant)
    }
    name, level = items.pop("event", None), items.pop("level", None)
    if isinstance(name, ast.Constant) and isinstance(level, ast.Constant):
        yield LoggedEvent(str(name.value), str(level.value), tuple(map(str, items)), place)


def _names(call: ast.Call) -> list[str | None]:
    """Return the names of an event that are literals in a log call: one name, or two names for `a if condition else b`.
    For any other expression, the list contains None."""
    first = call.args[0] if call.args else None
    parts = [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]
    return [part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else None for part in parts]


def _fields(call: ast.Call) -> Iterator[str]:
    for keyword in call.keywords:
        value = keyword.value
        if keyword.arg is not None:
            yield "exception" if keyword.arg == "exc_info" else keyword.arg
        elif _is_call_fields(value):
            yield from CALL_FIELDS
        elif _called(value) == "worker_fields":
            yield from WORKER_FIELDS
        else:
            yield MORE


def _is_call_fields(value: ast.expr) -> bool:
    """Return whether an expression is `call.log_fields` or `call_fields()`."""
    name = value.attr if isinstance(value, ast.Attribute) else value.id if isinstance(value, ast.Name) else ""
    return name.endswith("log_fields") or _called(value) == "call_fields"


def _called(value: ast.expr) -> str:
    """Return the name of the function that an expression calls; "" for any other expression."""
    return value.func.id if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) else ""
