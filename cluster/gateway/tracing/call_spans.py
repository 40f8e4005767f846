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

attempt_spans.py makes the spans of an attempt and places the durations that the worker has reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from cluster.gateway.tracing.attempt_spans import AttemptSpans
from cluster.gateway.tracing.call_trace import FINISHED, Attempt, CallFacts, CallTrace, SequenceFacts
from cluster.gateway.tracing.span_factory import SpanFactory
from cluster.observe import semantic_conventions as names
from cluster.observe.spans import Attributes, SpanKind, SpanRecord, Value

NO_FACTS = SequenceFacts()


class SpanBuilder:
    """Builder of the spans of one call."""

    def __init__(
        self, trace: CallTrace, facts: CallFacts, resource: Attributes, to_epoch_s: Callable[[float], float]
    ) -> None:
        """`resource`: resource attributes of the gateway. `to_epoch_s` converts monotonic seconds to seconds since the
        epoch."""
        self._trace = trace
        self._facts = facts
        self._factory = SpanFactory(trace, resource, to_epoch_s)
        self._attempts = AttemptSpans(self._factory, facts.ended_at)

    def spans(self) -> Iterator[SpanRecord]:
        """Yield all spans, the call's span first."""
        trace, facts = self._trace, self._facts
        yield self._call()
        admitted_at = facts.ended_at if trace.queued_at is None else trace.queued_at
        refused = facts.outcome if trace.queued_at is None and facts.is_error else ""
        yield self._factory.make(names.ADMISSION, trace.arrived, admitted_at, error=refused)
        if trace.queued_at is None:
            return
        by_sequence: dict[int, list[Attempt]] = {}
        for attempt in trace.attempts:
            by_sequence.setdefault(attempt.sequence, []).append(attempt)
        for index, attempts in by_sequence.items():
            yield from self._sequence(index, attempts)
        if not trace.attempts:
            yield self._factory.make(
                names.QUEUE, trace.queued_at, facts.ended_at, error=facts.outcome if facts.is_error else ""
            )

    def _sequence(self, index: int, attempts: list[Attempt]) -> Iterator[SpanRecord]:
        """Yield the spans of one sequence: each attempt, and the wait before it."""
        sequences, ended_at = self._facts.sequences, self._facts.ended_at
        known = sequences[index] if index < len(sequences) else NO_FACTS
        before: Attempt | None = None
        for at, attempt in enumerate(attempts):
            later = next((other.tokens_before for other in attempts[at + 1 :] if not other.is_hedge), known.tokens)
            tokens = 0 if attempt.route.first_output_at is None else max(later - attempt.tokens_before, 0)
            if not attempt.is_hedge:
                yield self._wait(index, before, attempt)
            yield from self._attempts.spans(attempt, before, tokens, known)
            if before is None or attempt.end_time(ended_at) >= before.end_time(ended_at):
                before = attempt
        if before is not None and before.end_reason not in (FINISHED, "aborted", "") and not known.finish_reason:
            yield self._unserved(index, before, known)

    # ---- the call

    def _call(self) -> SpanRecord:
        trace, facts = self._trace, self._facts
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
            self._factory.to_epoch_s(trace.arrived),
            self._factory.to_epoch_s(facts.ended_at),
            self._factory.resource,
            SpanKind.SERVER,
            attributes,
            error=facts.outcome if facts.is_error else "",
            trace_state=trace.trace_state,
        )

    # ---- waits

    def _wait(self, index: int, before: Attempt | None, attempt: Attempt) -> SpanRecord:
        """Return the span of the wait before an attempt.

        The span is named `queue` if the sequence had no tokens before the attempt, else `resume`. A `resume` span ends
        with the first token after the loss, because only then the caller gets text again.
        """
        attributes: dict[str, Value] = {names.SEQUENCE: index}
        if before is not None:
            since = attempt.sent_at if before.ended_at is None else before.ended_at
            attributes[names.WAIT_REASON] = before.end_reason
        else:
            since = self._queued_at
        if not attempt.tokens_before:
            return self._factory.make(names.QUEUE, since, attempt.sent_at, attributes)
        if before is None:
            attributes[names.WAIT_REASON] = "gateway"
        resumed_at = attempt.route.first_output_at
        until = attempt.end_time(self._facts.ended_at) if resumed_at is None else resumed_at
        attributes |= {names.TOKENS_BEFORE: attempt.tokens_before}
        followed = (attempt,) if before is None else (before, attempt)
        return self._factory.make(
            names.RESUME, since, until, attributes, links=tuple(each.context.span_id for each in followed)
        )

    def _unserved(self, index: int, before: Attempt, known: SequenceFacts) -> SpanRecord:
        """Return the span of the last wait of a sequence. During this wait the call ended, before another worker got
        the sequence."""
        since = before.end_time(self._facts.ended_at)
        name = names.RESUME if known.tokens else names.QUEUE
        attributes: dict[str, Value] = {names.SEQUENCE: index, names.WAIT_REASON: before.end_reason}
        error = self._facts.outcome if self._facts.is_error else ""
        return self._factory.make(
            name, since, self._facts.ended_at, attributes, links=(before.context.span_id,), error=error
        )

    @property
    def _queued_at(self) -> float:
        return self._trace.arrived if self._trace.queued_at is None else self._trace.queued_at
