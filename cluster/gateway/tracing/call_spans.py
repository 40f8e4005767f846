"""The spans of an ended call: a tree, which is made from the call's record. The module is pure.

    chat MODEL                     the call, in the gateway
    ├─ admission                   from arrival to the queue: template, tokens, guards, limits
    ├─ queue                       until a worker was chosen
    ├─ attempt                     on one worker; linked to the attempt before it
    │  ├─ route                    the decision with its reason, until the request was given to the link
    │  ├─ worker wait              on the worker, before the engine had the request
    │  ├─ engine queue             on the worker
    │  ├─ prefill                  on the worker
    │  ├─ decode                   on the worker
    │  └─ parse output             on the worker, after the last token
    └─ resume                      from the loss of a worker to the first token of the next one

The worker reports durations and no points in time, since clocks of two machines differ. The reported durations up to
the first output are placed in the middle between the Submit and the arrival of the first output, as if the request and
the output took equally long on the link. Durations that do not fit are shortened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from cluster.api.request_times import RequestTimes
from cluster.api.types import WorkerIdentity
from cluster.gateway.tracing.call_trace import FINISHED, Attempt, CallFacts, CallTrace, SequenceFacts
from cluster.observe import semantic_conventions as names
from cluster.observe.spans import Attributes, SpanEvent, SpanKind, SpanRecord, Value
from cluster.policy.routing.route_history import Candidates, Route

NO_FACTS = SequenceFacts()
WORKER, GATEWAY = "worker", "gateway"
"""Values of headrace.measured_by: the process whose clock has measured a span."""
NOT_ERRORS = (FINISHED, "moved", "hedged", "aborted")
"""Ends of an attempt that are no error of its worker."""


@dataclass(frozen=True, slots=True)
class SpanBuilder:
    """Makes the spans of one call. `resource`: attributes of the gateway. `to_epoch_s` converts monotonic seconds to
    seconds since the epoch."""

    trace: CallTrace
    facts: CallFacts
    resource: Attributes
    to_epoch_s: Callable[[float], float]

    def spans(self) -> Iterator[SpanRecord]:
        """Yield all spans, the call's span first."""
        trace, facts = self.trace, self.facts
        yield self._call()
        admitted_at = facts.ended_at if trace.queued_at is None else trace.queued_at
        refused = facts.outcome if trace.queued_at is None and facts.is_error else ""
        yield self._span(names.ADMISSION, trace.arrived, admitted_at, error=refused)
        if trace.queued_at is None:
            return
        by_sequence: dict[int, list[Attempt]] = {}
        for attempt in trace.attempts:
            by_sequence.setdefault(attempt.sequence, []).append(attempt)
        for index, attempts in by_sequence.items():
            yield from self._sequence(index, attempts)
        if not trace.attempts:
            yield self._span(
                names.QUEUE, trace.queued_at, facts.ended_at, error=facts.outcome if facts.is_error else ""
            )

    def _sequence(self, index: int, attempts: list[Attempt]) -> Iterator[SpanRecord]:
        """Yield the spans of one sequence: each attempt, and the wait before it."""
        sequences = self.facts.sequences
        known = sequences[index] if index < len(sequences) else NO_FACTS
        before: Attempt | None = None
        for at, attempt in enumerate(attempts):
            later = next((other.tokens_before for other in attempts[at + 1 :] if not other.is_hedge), known.tokens)
            tokens = 0 if attempt.route.first_output_at is None else max(later - attempt.tokens_before, 0)
            if not attempt.is_hedge:
                yield self._wait(index, before, attempt)
            yield from self._attempt(attempt, before, tokens, known)
            if before is None or self._end_of(attempt) >= self._end_of(before):
                before = attempt
        if before is not None and before.end_reason not in (FINISHED, "aborted", "") and not known.finish_reason:
            yield self._unserved(index, before, known)

    # ---- the call

    def _call(self) -> SpanRecord:
        trace, facts = self.trace, self.facts
        name = f"{facts.operation} {facts.requested_model}" if facts.is_known_model else facts.operation
        attributes: dict[str, Value] = {
            names.OPERATION: facts.operation,
            names.PROVIDER: names.PROVIDER_HEADRACE,
            names.REQUEST_MODEL: facts.requested_model,
            names.API: facts.api,
            names.TENANT: facts.tenant,
            names.REQUEST_ID: facts.request_id,
            names.OUTCOME: facts.outcome,
        }
        finish_reasons = [each.finish_reason for each in facts.sequences if each.finish_reason]
        optional: Mapping[str, Value | None] = {
            names.RESPONSE_MODEL: facts.model or None,
            names.VERSION: facts.version or None,
            names.RESPONSE_ID: facts.response_id or None,
            names.PRIORITY_CLASS: facts.priority_class or None,
            names.REQUEST_MAX_TOKENS: facts.max_tokens,
            names.REQUEST_TEMPERATURE: facts.temperature,
            names.REQUEST_TOP_P: facts.top_p,
            names.REQUEST_CHOICES: len(facts.sequences) if len(facts.sequences) > 1 else None,
            names.INPUT_TOKENS: facts.prompt_tokens,
            names.OUTPUT_TOKENS: None if facts.prompt_tokens is None else facts.completion_tokens,
            names.CACHED_TOKENS: facts.cached_tokens or None,
            names.REASONING_TOKENS: facts.reasoning_tokens or None,
            names.FINISH_REASONS: finish_reasons[:16] or None,
            names.TIME_TO_FIRST_CHUNK: facts.ttft_s,
            names.RESUMES: facts.resumes or None,
            names.IS_CONTINUED: facts.is_continued or None,
            names.OMITTED_ATTEMPTS: trace.omitted_attempts or None,
            names.ERROR_TYPE: facts.outcome if facts.is_error else None,
        }
        attributes |= {name: value for name, value in optional.items() if value is not None}
        return SpanRecord(
            name,
            trace.trace_id,
            trace.context.span_id,
            trace.parent_id,
            self.to_epoch_s(trace.arrived),
            self.to_epoch_s(facts.ended_at),
            self.resource,
            SpanKind.SERVER,
            attributes,
            error=facts.outcome if facts.is_error else "",
            trace_state=trace.trace_state,
        )

    # ---- waits

    def _wait(self, index: int, before: Attempt | None, attempt: Attempt) -> SpanRecord:
        """Return the span of the wait before an attempt: in the queue, or for another worker after a loss. The span of
        a resume ends with the first token after the loss, since then the caller gets text again."""
        attributes: dict[str, Value] = {names.SEQUENCE: index}
        if before is not None:
            since = attempt.sent_at if before.ended_at is None else before.ended_at
            attributes[names.WAIT_REASON] = before.end_reason
        else:
            since = self._queued_at
        if not attempt.tokens_before:
            return self._span(names.QUEUE, since, attempt.sent_at, attributes)
        if before is None:
            attributes[names.WAIT_REASON] = "gateway"
        resumed_at = attempt.route.first_output_at
        until = self._end_of(attempt) if resumed_at is None else resumed_at
        attributes |= {names.TOKENS_BEFORE: attempt.tokens_before}
        followed = (attempt,) if before is None else (before, attempt)
        return self._span(
            names.RESUME, since, until, attributes, links=tuple(each.context.span_id for each in followed)
        )

    def _unserved(self, index: int, before: Attempt, known: SequenceFacts) -> SpanRecord:
        """Return the span of a sequence's last wait, during which the call ended."""
        since = self.facts.ended_at if before.ended_at is None else before.ended_at
        name = names.RESUME if known.tokens else names.QUEUE
        attributes: dict[str, Value] = {names.SEQUENCE: index, names.WAIT_REASON: before.end_reason}
        error = self.facts.outcome if self.facts.is_error else ""
        return self._span(name, since, self.facts.ended_at, attributes, links=(before.context.span_id,), error=error)

    @property
    def _queued_at(self) -> float:
        return self.trace.arrived if self.trace.queued_at is None else self.trace.queued_at

    # ---- attempts

    def _attempt(
        self, attempt: Attempt, before: Attempt | None, tokens: int, known: SequenceFacts
    ) -> Iterator[SpanRecord]:
        ends_at, reason = self._end_of(attempt), attempt.end_reason or "aborted"
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
        events = () if first_at is None else (SpanEvent(names.FIRST_TOKEN, self.to_epoch_s(first_at)),)
        links = () if before is None else (before.context.span_id,)
        span_id = attempt.context.span_id
        yield self._span(
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
        yield self._span(names.ROUTE, attempt.sent_at, submitted_at, route_attributes(attempt.route), parent_id=span_id)
        yield from self._engine(attempt, first_at, ends_at, known)

    def _engine(
        self, attempt: Attempt, first_at: float | None, ends_at: float, known: SequenceFacts
    ) -> Iterator[SpanRecord]:
        """Yield the spans of the work on the worker. A span has the duration that the worker has reported; without one,
        its times are those at which the gateway sent the request and received output."""
        times = attempt.times or RequestTimes()
        parent_id, sent_at = attempt.context.span_id, attempt.submitted_at or attempt.sent_at
        resource = worker_resource(attempt.worker, self.resource)
        by_worker: dict[str, Value] = {names.MEASURED_BY: WORKER}
        by_gateway: dict[str, Value] = {names.MEASURED_BY: GATEWAY}
        if first_at is None:
            return
        window_s = max(first_at - sent_at, 0.0)
        measured_s = times.first_output_s
        if measured_s <= 0:
            yield self._span(names.PREFILL, sent_at, first_at, by_gateway, parent_id=parent_id)
            prefilled_at = first_at
        else:
            factor = min(window_s / measured_s, 1.0)
            at = sent_at + (window_s - measured_s * factor) / 2
            parts = ((names.WORKER_WAIT, times.wait_s), (names.ENGINE_QUEUE, times.queue_s))
            for name, seconds in (*parts, (names.PREFILL, times.prefill_s)):
                until = at + seconds * factor
                if seconds or name == names.PREFILL:
                    yield self._span(name, at, until, by_worker, parent_id=parent_id, resource=resource)
                at = until
            prefilled_at = at
        if not times.decode_s:
            last_at = max(attempt.last_token_at or ends_at, prefilled_at)
            yield self._span(names.DECODE, prefilled_at, min(last_at, ends_at), by_gateway, parent_id=parent_id)
            decoded_at = last_at
        else:
            decoded_at = min(prefilled_at + times.decode_s, ends_at)
            yield self._span(names.DECODE, prefilled_at, decoded_at, by_worker, parent_id=parent_id, resource=resource)
        if times.parse_s:
            attributes = {**by_worker, names.PARSER: known.parser} if known.parser else by_worker
            until = min(decoded_at + times.parse_s, ends_at)
            yield self._span(names.PARSE, decoded_at, until, attributes, parent_id=parent_id, resource=resource)

    def _end_of(self, attempt: Attempt) -> float:
        return self.facts.ended_at if attempt.ended_at is None else attempt.ended_at

    def _span(
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
        """Return a span below the call's span, or below `parent_id`. A span never ends before it begins."""
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


def route_attributes(route: Route) -> Attributes:
    """Return the attributes of a routing decision, without the scores of the workers, which `headrace explain request`
    shows."""
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
    """Return the attributes of an attempt that name the attempt's worker, with its version, GPU, pod and node."""
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
