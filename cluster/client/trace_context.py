"""The trace context that calls carry: the program's current OpenTelemetry span, if the program uses OpenTelemetry."""

from __future__ import annotations

import sys

TRACE_HEADERS = ("traceparent", "tracestate")
"""Headers of W3C trace context."""


def trace_headers() -> dict[str, str]:
    """Return the trace context of the current span as headers; empty if there is no current span.

    A program that has not imported OpenTelemetry has no current span, so this function does not import OpenTelemetry.
    """
    if "opentelemetry.trace" not in sys.modules:
        return {}
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier
