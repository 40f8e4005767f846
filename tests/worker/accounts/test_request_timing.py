"""The durations of a request at its worker add up to the time that has passed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.request_times import RequestTimes
from cluster.worker.accounts.request_timing import RequestTiming

seconds = st.floats(0, 100)


@given(seconds, seconds, seconds, seconds, seconds, st.booleans(), st.booleans())
def test_durations_add_up(
    queue_s: float, prefill_s: float, more_s: float, decode_s: float, parse_s: float, measured: bool, is_parsed: bool
) -> None:
    """The durations up to the first output add up to the time that has passed, and so do the durations up to the end.

    This holds with and without parsing, and with and without the engine's own measurements. Measured values stay as
    they are.
    """
    engine = RequestTimes(queue_s=queue_s, prefill_s=prefill_s) if measured else None
    timing, total_s = RequestTiming(1000.0), queue_s + prefill_s + more_s
    timing.record_first(engine, 1000.0 + total_s)
    first = timing.pop_first()
    assert first is not None
    assert first.first_output_s == pytest.approx(total_s)
    if engine is not None and engine.first_output_s:
        assert (first.queue_s, first.prefill_s) == (queue_s, prefill_s)
    timing.record_last(1000.0 + total_s + decode_s)
    rest = timing.pop_all(1000.0 + total_s + decode_s + (parse_s if is_parsed else 0.0), is_parsed=is_parsed)
    assert rest.first_output_s == 0, "sent before"
    assert rest.decode_s + rest.parse_s == pytest.approx(decode_s + (parse_s if is_parsed else 0.0))
    if is_parsed and decode_s > 1e-6:
        assert rest.parse_s == pytest.approx(parse_s, abs=1e-6)


def test_an_only_output_has_all_durations() -> None:
    """If the first parsed output of a request is also its last output, the request's durations are all reported at
    once. For a request without output, no duration is reported."""
    timing = RequestTiming(10.0)
    timing.record_first(RequestTimes(queue_s=1.0, prefill_s=2.0), 14.0)
    timing.record_last(15.0)
    assert timing.pop_all(15.5, is_parsed=True) == RequestTimes(1.0, 1.0, 2.0, 1.0, 0.5)
    assert RequestTiming(10.0).pop_all(20.0) == RequestTimes()
