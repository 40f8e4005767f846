"""Spans of ended calls, as plain values. span_export.py sends them to a collector."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Value = str | bool | int | float | Sequence[str]
Attributes = Mapping[str, Value]


class SpanKind(enum.Enum):
    """Kind of a span, with the values of OpenTelemetry."""

    SERVER = "server"
    CLIENT = "client"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class SpanEvent:
    """A point in time within a span. `at_s`: seconds since the epoch."""

    name: str
    at_s: float
    attributes: Attributes = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SpanRecord:
    """A span that has ended. Times are seconds since the epoch. Ids are lower-case hexadecimal.

    `parent_id`: "" for the first span of a trace. `links`: ids of earlier spans of the same trace that this span
    follows. `error`: kind of the error, as one word; "" for none. `resource`: attributes of the process that did the
    work.
    """

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_s: float
    end_s: float
    resource: Attributes
    kind: SpanKind = SpanKind.INTERNAL
    attributes: Attributes = field(default_factory=dict)
    events: Sequence[SpanEvent] = ()
    links: Sequence[str] = ()
    error: str = ""
    trace_state: str = ""
