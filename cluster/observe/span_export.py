"""Export of spans to a collector, by OTLP over gRPC. The module is imported only if tracing is on.

Problem: a slow or unreachable collector must not delay a call. Invariants: `add` never waits. At most `max_queued`
spans wait. Each span is counted once, as exported, dropped or failed.

A thread of this module calls OpenTelemetry's exporter. OpenTelemetry's BatchSpanProcessor is not used, because it
counts neither dropped nor failed spans.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import grpc
import structlog
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, TraceFlags, TraceState
from opentelemetry.trace.status import Status, StatusCode

from cluster.observe.semantic_conventions import SCHEMA_URL
from cluster.observe.spans import Attributes, SpanRecord

log = structlog.get_logger("tracing")

BATCH: Final = 512
INTERVAL_S: Final = 1.0
"""Longest time in seconds for which a span waits before the thread sends it."""
TIMEOUT_S: Final = 5.0
"""Longest time in seconds for sending one batch, with all retries. After this time, the batch has failed."""
LAST_S: Final = 3.0
"""Longest time in seconds for which `stop` sends the waiting spans."""
MAX_HEADERS: Final = 64

Count = Callable[[str, int], None]
_FLAGS = TraceFlags(TraceFlags.SAMPLED)
_OTEL_LOGGERS = ("opentelemetry.exporter.otlp.proto.grpc.exporter", "opentelemetry.exporter.otlp.proto.grpc")


def read_headers(path: Path, setting: str) -> tuple[tuple[str, str], ...]:
    """Return the headers in a file that has one `name: value` per line. Empty lines and lines that begin with # are
    skipped. Raises ValueError; the message names `setting`, the setting that contains the path."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{setting}: {path} cannot be read: {error}") from None
    headers = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, value = line.partition(":")
        name, value = name.strip().lower(), value.strip()
        is_name = name and all(c.isascii() and (c.isalnum() or c in "-_.") for c in name)
        if not colon or not is_name or not (value.isascii() and value.isprintable()):
            raise ValueError(f"{setting}: {path}, line {number}: write `name: value`, in ASCII")
        headers.append((name, value))
    if len(headers) > MAX_HEADERS:
        raise ValueError(f"{setting}: {path} has {len(headers)} headers; at most {MAX_HEADERS} are allowed")
    return tuple(headers)


class SpanExport:
    """Queue of spans, and the thread that sends them."""

    def __init__(
        self,
        endpoint: str,
        count: Count,
        *,
        ca_file: Path | None = None,
        headers_file: Path | None = None,
        max_queued: int = 16_384,
        interval_s: float = INTERVAL_S,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`endpoint`: URL of the collector; https:// means TLS. `count(outcome, number)`: called to count spans. The
        outcome is `exported` or `failed` in calls from the export thread, and `dropped` in calls from `add` and `stop`.
        Raises ValueError if a file cannot be used."""
        self._endpoint = endpoint
        self._count = count
        self._ca_file = ca_file
        self._headers_file = headers_file
        self._max_queued = max_queued
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._queue: deque[SpanRecord] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._is_away = False
        self._reason = _LastReason()
        self._files = self._file_states()
        self._exporter = self._connect()
        self._thread = threading.Thread(target=self._run, name="span-export", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        for name in _OTEL_LOGGERS:
            logging.getLogger(name).addFilter(self._reason)
        self._thread.start()

    def stop(self) -> None:
        """Send the waiting spans for at most LAST_S seconds, and end the thread. Blocks until then."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(LAST_S)
        self._exporter.shutdown()
        if lost := len(self._queue):
            self._count("dropped", lost)
            log.warning("tracing.spans_lost", spans=lost, collector=self._endpoint)
        for name in _OTEL_LOGGERS:
            logging.getLogger(name).removeFilter(self._reason)

    def add(self, spans: Iterable[SpanRecord]) -> None:
        """Queue the spans of a call. If the queue has no room for all spans of the call, all of them are dropped."""
        more = tuple(spans)
        if self._stopping or len(self._queue) + len(more) > self._max_queued:
            self._count("dropped", len(more))
            return
        self._queue.extend(more)
        if len(self._queue) >= BATCH:
            self._wake.set()

    # ---- the thread

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(self._interval_s)
            self._wake.clear()
            self._send_all()
        self._send_all()

    def _send_all(self) -> None:
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
            is_sent = False
            try:
                self._reconnect_if_changed()
                resources: dict[int, Resource] = {}
                is_sent = self._exporter.export([_readable(span, resources) for span in batch]) is _SUCCESS
            except Exception as error:  # spans are lost, calls are not
                self._reason.text = f"{type(error).__name__}: {error}"
            self._count("exported" if is_sent else "failed", len(batch))
            self._note(is_sent)

    def _note(self, is_sent: bool) -> None:
        """Log when the collector begins to refuse spans, and when it accepts spans again."""
        if is_sent and self._is_away:
            log.info("tracing.collector_found", collector=self._endpoint)
        elif not is_sent and not self._is_away:
            log.warning("tracing.collector_lost", collector=self._endpoint, reason=self._reason.text)
        self._is_away = not is_sent

    def _connect(self) -> OTLPSpanExporter:
        """Return an exporter with the current headers and CA from the files. Raises ValueError."""
        setting = "observe.tracing"
        credentials, headers = None, None
        if self._endpoint.startswith("https:"):
            try:
                root = None if self._ca_file is None else self._ca_file.read_bytes()
            except OSError as error:
                raise ValueError(f"{setting}.ca_file: {self._ca_file} cannot be read: {error}") from None
            credentials = grpc.ssl_channel_credentials(root)
        if self._headers_file is not None:
            headers = read_headers(self._headers_file, f"{setting}.headers_file")
        return OTLPSpanExporter(
            endpoint=self._endpoint, credentials=credentials, headers=headers, timeout=self._timeout_s
        )

    def _file_states(self) -> tuple[float, ...]:
        files = [path for path in (self._ca_file, self._headers_file) if path is not None]
        return tuple(path.stat().st_mtime for path in files if path.exists())

    def _reconnect_if_changed(self) -> None:
        """Make a new exporter if the headers file or the CA file has changed, because an exporter reads them only
        once."""
        if (files := self._file_states()) != self._files:
            exporter = self._connect()
            self._exporter.shutdown()
            self._files, self._exporter = files, exporter


_SUCCESS = SpanExportResult.SUCCESS


class _LastReason(logging.Filter):
    """Log filter that keeps the exporter's many messages out of the log, and remembers the last message."""

    text = ""

    def filter(self, record: logging.LogRecord) -> bool:
        self.text = record.getMessage()[:500]
        return False


def _readable(span: SpanRecord, resources: dict[int, Resource]) -> ReadableSpan:
    """Convert a span to the form of OpenTelemetry's SDK. `resources`: a cache that the spans of a batch share."""
    trace_id, state = int(span.trace_id, 16), TraceState.from_header([span.trace_state] if span.trace_state else [])

    def context(span_id: str, is_remote: bool = False) -> SpanContext:
        return SpanContext(trace_id, int(span_id, 16), is_remote, _FLAGS, state)

    is_server = span.kind.value == "server"
    return ReadableSpan(
        name=span.name,
        context=context(span.span_id),
        parent=context(span.parent_id, is_remote=is_server) if span.parent_id else None,
        resource=_resource(span.resource, resources),
        attributes=_values(span.attributes),
        events=[Event(event.name, _values(event.attributes), _ns(event.at_s)) for event in span.events],
        links=[Link(context(span_id)) for span_id in span.links],
        kind=SpanKind[span.kind.name],
        status=Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.UNSET),
        start_time=_ns(span.start_s),
        end_time=_ns(span.end_s),
        instrumentation_scope=_SCOPE,
    )


_SCOPE = InstrumentationScope("headrace", schema_url=SCHEMA_URL)


def _resource(attributes: Attributes, known: dict[int, Resource]) -> Resource:
    key = hash(tuple(sorted((name, str(value)) for name, value in attributes.items())))
    if key not in known:
        known[key] = Resource(_values(attributes))
    return known[key]


def _values(attributes: Attributes) -> Mapping[str, Any]:
    return {
        name: tuple(v) if isinstance(v, Sequence) and not isinstance(v, str) else v for name, v in attributes.items()
    }


def _ns(at_s: float) -> int:
    return round(at_s * 1e9)
