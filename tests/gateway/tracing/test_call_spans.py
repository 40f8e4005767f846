"""The spans of an ended call, built from any record that a gateway may have of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.request_times import RequestTimes
from cluster.api.types import WorkerIdentity
from cluster.gateway.tracing.call_spans import SpanBuilder
from cluster.gateway.tracing.call_trace import FINISHED, MAX_ATTEMPTS, CallFacts, CallTrace, SequenceFacts
from cluster.observe import semantic_conventions as names
from cluster.observe.spans import SpanKind, SpanRecord
from cluster.observe.trace_context import TraceContext
from cluster.policy.routing.route_history import Route

RESOURCE = {names.SERVICE_NAME: names.GATEWAY_SERVICE, names.CLUSTER: "test"}
TRACE_ID, ROOT = "a" * 32, "b" * 16
ENDS = (FINISHED, "lost", "moved", "error", "refused", "hedged", "aborted")
EPSILON = 1e-6


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def new_trace(clock: Callable[[], float], parent: str = "") -> CallTrace:
    """Return the record of a call that arrives at 100 s."""
    numbers = itertools.count(1)
    return CallTrace(clock, TraceContext(TRACE_ID, ROOT, True), lambda: f"{next(numbers):016x}", 100.0, parent)


def facts(**changed: object) -> CallFacts:
    """Return the facts of a call that ends at 110 s."""
    usual = {
        "operation": names.CHAT, "outcome": "ok", "ended_at": 110.0, "api": "grpc", "tenant": "acme",
        "request_id": "r", "requested_model": "m", "is_known_model": True,
    }  # fmt: skip
    return CallFacts(**{**usual, **changed})  # type: ignore[arg-type]


def spans_of(trace: CallTrace, known: CallFacts) -> list[SpanRecord]:
    """Return the spans with times on the gateway's own clock."""
    return list(SpanBuilder(trace, known, RESOURCE, lambda at: at).spans())


def route(at: float, first_output_at: float | None = None) -> Route:
    """Return the route of a sequence that was sent at the time `at`, in seconds."""
    return Route(0, at, "w1", "least_loaded", 12, first_output_at=first_output_at)


def check_tree(spans: list[SpanRecord]) -> None:
    """Check that the spans form one tree of one trace, lie within the call's span, and are in order of time."""
    root, *others = spans
    known = {span.span_id: span for span in spans}
    assert len(known) == len(spans), "each span has an id of its own"
    assert {span.trace_id for span in spans} == {root.trace_id}
    assert all(span.start_s <= span.end_s for span in spans)
    for span in others:
        parent = known[span.parent_id]
        assert parent.start_s - EPSILON <= span.start_s
        assert span.end_s <= parent.end_s + EPSILON, (span, parent)
        assert set(span.links) <= known.keys()
    assert root.kind is SpanKind.SERVER


durations = st.sampled_from([0.0, 0.001, 0.5, 3.0, 90.0])
waits = st.sampled_from([0.0, 0.001, 0.01, 1.0])


@given(st.data())
def test_any_record_makes_one_tree(data: st.DataObject) -> None:
    """For any attempts of a call, and any durations that workers report, the spans form one tree. Each span lies within
    its parent, and no span ends before it begins."""
    clock = Clock()
    trace = new_trace(clock)
    draw = data.draw
    sequences = draw(st.integers(1, 3))
    if draw(st.booleans()):
        clock.now += draw(waits)
        trace.queued()
        for _ in range(draw(st.integers(0, 5))):
            clock.now += draw(waits)
            made = route(clock.now)
            attempt = trace.begin_attempt(
                draw(st.integers(0, sequences - 1)),
                made,
                WorkerIdentity("w1", "i1", "m"),
                draw(st.integers(0, 9)),
                is_hedge=draw(st.booleans()),
            )
            assert attempt is not None
            if draw(st.booleans()):
                clock.now += draw(waits)
                attempt.submitted()
            if draw(st.booleans()):
                clock.now += draw(waits)
                made.first_output_at = clock.now
            for _ in range(draw(st.integers(0, 2))):
                attempt.add_times(RequestTimes(*(draw(durations) for _ in range(5))))
            last_token_at = clock.now
            clock.now += draw(waits)
            if draw(st.booleans()):
                attempt.end(draw(st.sampled_from(ENDS)), draw(st.sampled_from([0.0, last_token_at])))
    known = facts(
        ended_at=clock.now + draw(waits),
        is_error=draw(st.booleans()),
        sequences=tuple(SequenceFacts(draw(st.integers(0, 20)), draw(st.sampled_from(["", "stop"]))) for _ in range(3)),
    )
    check_tree(spans_of(trace, known))


def test_a_worker_that_measures_is_believed_and_placed_in_the_middle() -> None:
    """The durations that a worker measured become spans, in order. Together they are centred between Submit and the
    first output, since messages on the link are assumed to take equal times in both directions."""
    clock = Clock()
    trace = new_trace(clock)
    trace.queued()
    attempt = trace.begin_attempt(0, made := route(101.0), WorkerIdentity("w1", "i1", "m", pod="p", host="n"), 0)
    assert attempt is not None
    clock.now = 101.0
    attempt.submitted()
    made.first_output_at = 102.0
    attempt.add_times(RequestTimes(wait_s=0.1, queue_s=0.2, prefill_s=0.3))
    attempt.add_times(RequestTimes(decode_s=4.0, parse_s=0.5))
    clock.now = 107.0
    attempt.end(FINISHED)
    spans = {span.name: span for span in spans_of(trace, facts(sequences=(SequenceFacts(9, "stop", "hermes"),)))}
    parts = [spans[name] for name in (names.WORKER_WAIT, names.ENGINE_QUEUE, names.PREFILL, names.DECODE, names.PARSE)]
    assert [(round(span.start_s, 6), round(span.end_s, 6)) for span in parts] == [
        (101.2, 101.3), (101.3, 101.5), (101.5, 101.8), (101.8, 105.8), (105.8, 106.3)
    ]  # fmt: skip
    for span in parts:
        assert span.resource[names.SERVICE_NAME] == names.WORKER_SERVICE
        assert (span.resource[names.POD], span.resource[names.NODE]) == ("p", "n")
        assert span.attributes[names.MEASURED_BY] == "worker"
    assert spans[names.PARSE].attributes[names.PARSER] == "hermes"
    assert spans[names.ATTEMPT].attributes[names.TOKENS] == 9


def test_a_worker_that_measures_nothing_has_the_gateways_times() -> None:
    """A worker of an older release measures nothing. The spans of its prefill and decode then have the times that the
    gateway measured, and an attribute that names the gateway as the source of the times."""
    clock = Clock()
    trace = new_trace(clock)
    trace.queued()
    attempt = trace.begin_attempt(0, route(101.0, 102.0), WorkerIdentity("w1", "i1", "m"), 0)
    assert attempt is not None
    clock.now = 105.0
    attempt.end("lost", 104.0)
    spans = {span.name: span for span in spans_of(trace, facts())}
    assert (spans[names.PREFILL].start_s, spans[names.PREFILL].end_s) == (101.0, 102.0)
    assert (spans[names.DECODE].start_s, spans[names.DECODE].end_s) == (102.0, 104.0)
    assert spans[names.DECODE].attributes[names.MEASURED_BY] == "gateway"
    assert spans[names.DECODE].resource == RESOURCE
    assert spans[names.ATTEMPT].error == "lost"


def test_a_refused_call_has_its_admission() -> None:
    """A call that is refused before the queue has the span of the call and the span of its admission, both with the
    outcome as error. The span's name does not contain the name of an unknown model."""
    trace = new_trace(Clock())
    known = facts(outcome="model_not_found", is_error=True, is_known_model=False, requested_model="no-such-model")
    root, admission = spans_of(trace, known)
    assert (root.name, root.error, admission.name, admission.error) == (
        "chat", "model_not_found", names.ADMISSION, "model_not_found"
    )  # fmt: skip
    assert root.attributes[names.REQUEST_MODEL] == "no-such-model"
    check_tree([root, admission])


def test_attempts_are_bounded() -> None:
    """A call with many inputs has at most MAX_ATTEMPTS attempts in its trace. The trace states how many are left
    out."""
    trace = new_trace(Clock())
    trace.queued()
    made = [trace.begin_attempt(i, route(100.0), WorkerIdentity("w1", "i1", "m"), 0) for i in range(MAX_ATTEMPTS + 7)]
    assert made.count(None) == 7
    root, *others = spans_of(trace, facts())
    assert root.attributes[names.OMITTED_ATTEMPTS] == 7
    assert sum(span.name == names.ATTEMPT for span in others) == MAX_ATTEMPTS


@pytest.mark.parametrize("end", ["lost", "refused"])
def test_a_wait_that_never_ended_is_in_the_trace(end: str) -> None:
    """If a call ends while its sequence waits for another worker, the last span is this wait, with the outcome of the
    call as its error."""
    clock = Clock()
    trace = new_trace(clock)
    trace.queued()
    attempt = trace.begin_attempt(0, route(101.0, 102.0), WorkerIdentity("w1", "i1", "m"), 0)
    assert attempt is not None
    clock.now = 104.0
    attempt.end(end, 103.0)
    known = facts(outcome="worker_lost", is_error=True, sequences=(SequenceFacts(3),))
    last = spans_of(trace, known)[-1]
    assert (last.name, last.start_s, last.end_s, last.error) == (names.RESUME, 104.0, 110.0, "worker_lost")
    assert last.links == (attempt.context.span_id,)
