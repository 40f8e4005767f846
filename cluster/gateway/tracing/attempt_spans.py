"""The spans of one attempt of a call: the attempt, its routing decision, and the work on the worker.

The worker reports durations, not points in time, because the clocks of two machines differ. The durations up to the
first output are placed in the middle of the time from the Submit to the arrival of the first output, on the assumption
that request and output took equally long on the link. Durations that do not fit are shortened.
"""

from __future__ import annotations

from collections.abc import Iterator

from cluster.api.request_times import RequestTimes
from cluster.api.types import WorkerIdentity
from cluster.gateway.tracing.call_trace import FINISHED, Attempt, SequenceFacts
from cluster.gateway.tracing.span_factory import SpanFactory
from cluster.observe import semantic_conventions as names
from cluster.observe.spans import Attributes, SpanEvent, SpanKind, SpanRecord, Value
from cluster.policy.routing.route_history import Candidates, Route

WORKER, GATEWAY = "worker", "gateway"
"""Values of headrace.measured_by: the process whose clock has measured a span."""
NOT_ERRORS = (FINISHED, "moved", "hedged", "aborted")
"""Ends of an attempt that are no error of its worker."""


class AttemptSpans:
    """Makes the spans of the attempts of one call."""

    def __init__(self, factory: SpanFactory, call_ended_at: float) -> None:
        """`call_ended_at`: monotonic time of the call's end. It is used as the end of an attempt for which no end was
        recorded."""
        self._factory = factory
        self._call_ended_at = call_ended_at

    def spans(
        self, attempt: Attempt, before: Attempt | None, tokens: int, known: SequenceFacts
    ) -> Iterator[SpanRecord]:
        """Yield the spans of an attempt, the attempt's own span first. `before`: the sequence's previous attempt, to
        which the span links. `tokens`: number of tokens of the attempt. `known`: facts about the attempt's sequence."""
        ends_at, reason = attempt.end_time(self._call_ended_at), attempt.end_reason or "aborted"
        worker, first_at = attempt.worker, attempt.route.first_output_at
        attributes: dict[str, Value] = {
            names.SEQUENCE: attempt.sequence,
            names.ATTEMPT_NUMBER: attempt.number,
            names.ATTEMPT_END: reason,
            names.TOKENS_BEFORE: attempt.tokens_before,
            names.TOKENS: tokens,
            **worker_attributes(worker),
        }
        if attempt.route.cached_tokens is not None:
            attributes[names.ATTEMPT_CACHED] = attempt.route.cached_tokens
        error = "" if reason in NOT_ERRORS else reason
        if error:
            attributes[names.ERROR_TYPE] = error
        events = () if first_at is None else (SpanEvent(names.FIRST_TOKEN, self._factory.to_epoch_s(first_at)),)
        links = () if before is None else (before.context.span_id,)
        span_id = attempt.context.span_id
        yield self._factory.make(
            names.ATTEMPT,
            attempt.sent_at,
            ends_at,
            attributes,
            span_id=span_id,
            kind=SpanKind.CLIENT,
            events=events,
            links=links,
            error=error,
        )
        submitted_at = attempt.submitted_at or attempt.sent_at
        yield self._factory.make(
            names.ROUTE, attempt.sent_at, submitted_at, route_attributes(attempt.route), parent_id=span_id
        )
        yield from self._engine(attempt, first_at, ends_at, known)

    def _engine(
        self, attempt: Attempt, first_at: float | None, ends_at: float, known: SequenceFacts
    ) -> Iterator[SpanRecord]:
        """Yield the spans of the work on the worker. A span has the duration that the worker has reported. Without a
        reported duration, a span begins and ends at the times that the gateway measured."""
        times = attempt.times or RequestTimes()
        parent_id, sent_at = attempt.context.span_id, attempt.submitted_at or attempt.sent_at
        resource = worker_resource(attempt.worker, self._factory.resource)
        by_worker: dict[str, Value] = {names.MEASURED_BY: WORKER}
        by_gateway: dict[str, Value] = {names.MEASURED_BY: GATEWAY}
        if first_at is None:
            return
        window_s = max(first_at - sent_at, 0.0)
        measured_s = times.first_output_s
        if measured_s <= 0:
            yield self._factory.make(names.PREFILL, sent_at, first_at, by_gateway, parent_id=parent_id)
            prefilled_at = first_at
        else:
            factor = min(window_s / measured_s, 1.0)
            at = sent_at + (window_s - measured_s * factor) / 2
            parts = ((names.WORKER_WAIT, times.wait_s), (names.ENGINE_QUEUE, times.queue_s))
            for name, seconds in (*parts, (names.PREFILL, times.prefill_s)):
                until = at + seconds * factor
                if seconds or name == names.PREFILL:
                    yield self._factory.make(name, at, until, by_worker, parent_id=parent_id, resource=resource)
                at = until
            prefilled_at = at
        if not times.decode_s:
            last_at = max(attempt.last_token_at or ends_at, prefilled_at)
            yield self._factory.make(names.DECODE, prefilled_at, min(last_at, ends_at), by_gateway, parent_id=parent_id)
            decoded_at = last_at
        else:
            decoded_at = min(prefilled_at + times.decode_s, ends_at)
            yield self._factory.make(
                names.DECODE, prefilled_at, decoded_at, by_worker, parent_id=parent_id, resource=resource
            )
        if times.parse_s:
            attributes = {**by_worker, names.PARSER: known.parser} if known.parser else by_worker
            until = min(decoded_at + times.parse_s, ends_at)
            yield self._factory.make(names.PARSE, decoded_at, until, attributes, parent_id=parent_id, resource=resource)


def route_attributes(route: Route) -> Attributes:
    """Return the attributes of a routing decision. The scores of the workers are left out; `headrace explain request`
    shows them."""
    attributes: dict[str, Value] = {names.ROUTE_REASON: route.reason, names.ROUTE_PROMPT: route.tokens}
    if route.again:
        attributes[names.ROUTE_AGAIN] = route.again
    if route.predicted_cached_tokens is not None:
        attributes[names.ROUTE_PREDICTED] = route.predicted_cached_tokens
    if isinstance(route.decision, Candidates):  # else the scores are not computed yet, which takes long
        attributes[names.ROUTE_WORKERS] = route.decision.total
        if dropped := sum(route.decision.dropped.values()):
            attributes[names.ROUTE_DROPPED] = dropped
    if route.awaited:
        attributes |= {names.ROUTE_AWAITED: route.awaited, names.ROUTE_WAIT: route.wait_s}
    return attributes


def worker_attributes(worker: WorkerIdentity) -> Attributes:
    """Return the attributes that describe the worker of an attempt: its id, version, GPU, pod and node."""
    attributes = {names.WORKER: worker.worker_id, names.VERSION: worker.version, names.GPU: worker.gpu}
    attributes |= {names.POD: worker.pod, names.NODE: worker.host or worker.node}
    return {name: value for name, value in attributes.items() if value}


def worker_resource(worker: WorkerIdentity, gateway: Attributes) -> Attributes:
    """Return the resource attributes of spans that show work in a worker. `gateway`: the resource attributes of the
    gateway."""
    attributes: dict[str, Value] = {
        names.SERVICE_NAME: names.WORKER_SERVICE,
        names.SERVICE_INSTANCE: worker.worker_id,
        names.CLUSTER: gateway.get(names.CLUSTER, ""),
    }
    attributes |= {names.POD: worker.pod} if worker.pod else {}
    if place := worker.host or worker.node:
        attributes[names.NODE if worker.pod else names.HOST] = place
    return attributes
