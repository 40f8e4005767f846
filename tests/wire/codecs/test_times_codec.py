"""Conversion of the durations that a worker reports for sampled requests."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.request_times import RequestTimes
from cluster.api.types import FinishReason, TokenOutput
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.codecs.codec import StepColumns, outputs_from_pb
from cluster.wire.codecs.times_codec import MAX_S, times_by_slot

durations = st.floats(0, 1000, width=32)
times = st.builds(RequestTimes, durations, durations, durations, durations, durations)


@given(times, times)
def test_times_of_merged_outputs_are_merged(first: RequestTimes, last: RequestTimes) -> None:
    """If a message has two outputs of one request (slot), they are decoded as one output that has the durations of
    both. Outputs of a request without durations are decoded without durations."""
    columns = StepColumns()
    columns.add(3, TokenOutput("", [1], prompt_tokens=5, times=first))
    columns.add(4, TokenOutput("", [1]))
    columns.add(3, TokenOutput("", [2], FinishReason.STOP, times=last))
    outputs = dict(outputs_from_pb(pb.StepOutputs.FromString(columns.to_pb().SerializeToString())))
    merged = RequestTimes(first.wait_s, first.queue_s, first.prefill_s, first.decode_s, first.parse_s)
    merged.update(last)
    assert (outputs[3].times, outputs[4].times) == (merged, None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 2 * MAX_S])
def test_impossible_durations_count_as_unknown(value: float) -> None:
    """An impossible duration, which only a faulty worker sends, is decoded as 0."""
    (read,) = times_by_slot([pb.SlotTimes(slot=1, wait_s=value, prefill_s=0.5)]).values()
    assert read == RequestTimes(prefill_s=0.5)
