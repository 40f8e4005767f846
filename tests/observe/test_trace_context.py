"""W3C trace context: what is accepted from callers, and which calls are sampled."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import TraceState
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cluster.observe.trace_context import (
    MAX_STATE,
    TraceContext,
    checked_tracestate,
    is_in_ratio,
    is_sampled,
    parse_traceparent,
    unsampled,
)

HEX = st.text("0123456789abcdef", min_size=1)


def ids(digits: int) -> st.SearchStrategy[str]:
    """Return a strategy of ids that are not all zeros."""
    return st.integers(1, 16**digits - 1).map(lambda number: f"{number:0{digits}x}")


@given(ids(32), ids(16), st.booleans())
def test_a_context_is_read_as_it_was_written(trace_id: str, span_id: str, sampled: bool) -> None:
    """Parsing a written traceparent gives the same context, and OpenTelemetry's own parser agrees."""
    context = TraceContext(trace_id, span_id, sampled)
    assert parse_traceparent(context.traceparent) == context
    assert is_sampled(context.traceparent) is sampled
    assert parse_traceparent(unsampled(context.traceparent)) == TraceContext(trace_id, span_id, False)
    extracted = TraceContextTextMapPropagator().extract({"traceparent": context.traceparent})
    (span,) = extracted.values()
    there = span.get_span_context()  # type: ignore[attr-defined]
    assert (f"{there.trace_id:032x}", f"{there.span_id:016x}") == (trace_id, span_id)
    assert bool(there.trace_flags.sampled) is sampled


A, B = "a" * 32, "b" * 16


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        f"00-{A}-{B}",
        f"00-{A}-{B}-0",
        f"00-{A}-{B}-01-more",
        f"00-{'0' * 32}-{B}-01",
        f"00-{A}-{'0' * 16}-01",
        f"ff-{A}-{B}-01",
        f"00-{A.upper()}-{B}-01",
        f" 00-{A}-{B}-01",
        f"00-{A}-{B}-01\n",
        f"00-{A}-{B}-zz",
    ],
)
def test_an_invalid_traceparent_is_none(text: str) -> None:
    """A traceparent that is invalid by the standard has no context and counts as not sampled."""
    assert parse_traceparent(text) is None
    assert not is_sampled(text)


def test_a_later_version_is_read_as_far_as_it_is_known() -> None:
    """From a traceparent of a later version, the known fields are read, and further fields and flags are ignored."""
    assert parse_traceparent(f"01-{A}-{B}-03-more") == TraceContext(A, B, True)
    assert parse_traceparent(f"cc-{A}-{B}-02") == TraceContext(A, B, False)


@given(st.text(max_size=600))
def test_only_a_valid_tracestate_passes(text: str) -> None:
    """`checked_tracestate` returns either its argument unchanged or "". It never returns a text that is too long or not
    ASCII."""
    passed = checked_tracestate(text)
    assert passed in ("", text)
    assert len(passed) <= MAX_STATE
    assert passed.isascii()


@pytest.mark.parametrize("text", ["a=1", "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE", "t@v=x , b=y", "a=1,,b=2"])
def test_usual_tracestates_pass(text: str) -> None:
    """Tracestate lists of the forms that the standard shows are valid, and OpenTelemetry reads all their members."""
    assert checked_tracestate(text) == text
    assert len(TraceState.from_header([text])) == len([part for part in text.split(",") if part.strip()])


@pytest.mark.parametrize("text", ["a", "=1", "A=1", "a=\x00", "a=ä", "a=1\n", "a=" + "x" * 300, "a=1," * 200])
def test_an_invalid_tracestate_is_dropped(text: str) -> None:
    """For a tracestate that is too long or has an invalid member, `checked_tracestate` returns ""."""
    assert checked_tracestate(text) == ""


@given(ids(32), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_ratio_samples_the_same_calls_and_more(trace_id: str, one: float, other: float) -> None:
    """Every call that is sampled at one ratio is also sampled at any higher ratio. No call is sampled at 0, and every
    call at 1."""
    low, high = sorted((one, other))
    assert is_in_ratio(trace_id, high) or not is_in_ratio(trace_id, low)
    assert is_in_ratio(trace_id, 1)
    assert not is_in_ratio(trace_id, 0)


def test_the_ratio_is_a_share() -> None:
    """Of evenly spread trace ids, the share that is sampled equals the ratio."""
    step = (1 << 56) // 1000
    sampled = sum(is_in_ratio(f"{1:018x}{number * step:014x}", 0.25) for number in range(1000))
    assert abs(sampled - 250) <= 1
