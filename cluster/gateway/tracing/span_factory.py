"""The factory of the spans of one call, which share the call's trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.gateway.tracing.call_trace import CallTrace
from cluster.observe.spans import Attributes, SpanEvent, SpanKind, SpanRecord


@dataclass(frozen=True, slots=True)
class SpanFactory:
    """Makes the spans below the span of one call. `resource`: resource attributes of the gateway. `to_epoch_s` converts
    monotonic seconds to seconds since the epoch."""

    trace: CallTrace
    resource: Attributes
    to_epoch_s: Callable[[float], float]

    def make(
        self,
        name: str,
        start: float,
        end: float,
        attributes: Attributes | None = None,
        *,
        parent_id: str = "",
        span_id: str = "",
        kind: SpanKind = SpanKind.INTERNAL,
        events: tuple[SpanEvent, ...] = (),
        links: tuple[str, ...] = (),
        error: str = "",
        resource: Attributes | None = None,
    ) -> SpanRecord:
        """Return a span below the call's span, or below `parent_id`. If `end` is before `start`, the span ends at
        `start`."""
        trace = self.trace
        return SpanRecord(
            name,
            trace.trace_id,
            span_id or trace.new_span_id(),
            parent_id or trace.context.span_id,
            self.to_epoch_s(start),
            self.to_epoch_s(max(start, end)),
            self.resource if resource is None else resource,
            kind,
            attributes or {},
            events,
            links,
            error,
            trace.trace_state,
        )
