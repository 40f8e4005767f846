"""The tracer of a gateway: it samples calls when they arrive, and exports the spans of sampled calls when they end."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable

from cluster.gateway.tracing.call_spans import SpanBuilder
from cluster.gateway.tracing.call_trace import CallFacts, CallTrace
from cluster.observe.spans import Attributes, SpanRecord
from cluster.observe.trace_context import TraceContext, is_in_ratio, parse_traceparent


class Tracer:
    """The tracer of one gateway process. A call that is not sampled costs about a microsecond."""

    def __init__(
        self,
        export: Callable[[Iterable[SpanRecord]], None],
        resource: Attributes,
        sample_ratio: float,
        *,
        follow_caller: bool = True,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        random_bits: Callable[[int], int] = secrets.randbits,
    ) -> None:
        """`export`: gets the spans of an ended call; it must not block. `resource`: attributes of this process.
        `follow_caller`: if True, the traceparent header of a call, if there is one, decides whether the call is
        sampled. `sample_ratio`: the share of all other calls that is sampled."""
        self._export = export
        self._resource = resource
        self._ratio = sample_ratio
        self._follow_caller = follow_caller
        self._clock = clock
        self._wall = wall
        self._random_bits = random_bits

    def begin(self, traceparent: str, trace_state: str, arrived: float) -> CallTrace | None:
        """Return the trace of a call that has arrived; None if the call is not sampled. `traceparent`, `trace_state`:
        the caller's headers of these names, "" for a missing header."""
        parent = parse_traceparent(traceparent) if traceparent else None
        if parent is None:
            trace_id, trace_state = f"{self._random_bits(128) or 1:032x}", ""
        else:
            trace_id = parent.trace_id
        if parent is not None and self._follow_caller:
            if not parent.is_sampled:
                return None
        elif not is_in_ratio(trace_id, self._ratio):
            return None
        context = TraceContext(trace_id, self._span_id(), True)
        parent_id = "" if parent is None else parent.span_id
        return CallTrace(self._clock, context, self._span_id, arrived, parent_id, trace_state)

    def ended(self, trace: CallTrace, facts: CallFacts) -> None:
        """Export the spans of a call that has ended."""
        offset = self._wall() - self._clock()
        self._export(SpanBuilder(trace, facts, self._resource, lambda at: at + offset).spans())

    def _span_id(self) -> str:
        return f"{self._random_bits(64) or 1:016x}"
