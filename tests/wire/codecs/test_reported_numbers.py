"""Whatever numbers a peer reports, the decoded numbers spoil no sum: they are finite and bounded, or the message is
refused."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.link.v1 import link_pb2 as pb
from cluster.policy.fairness.fair_queue import FairOrder
from cluster.policy.fairness.service_counters import FlowKey
from cluster.policy.tenants.policy import MAX_WEIGHT, MIN_WEIGHT
from cluster.wire.codecs.codec import usage_from_pb
from cluster.wire.codecs.demand_codec import work_from_pb
from cluster.wire.codecs.fairness_codec import flows_from_pb, served_from_pb

numbers = st.floats(width=64)


@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=5))
@example([(0.0, 0.0, 1.0), (1.7e308, -1.7e308, 5e-324)])
@example([(1.7e308, 0.0, 1.0), (0.0, 1.7e308, 1.0)])
def test_reports_of_service_keep_counters_finite(reports: list[tuple[float, float, float]]) -> None:
    """After any reports of service by a worker, the service counter of the tenant is finite, and so is the weight."""
    weights = {"a": 1.0}
    order = FairOrder(weight_of=lambda tenant: weights[tenant])
    for number, (total, by_this_link, weight) in enumerate(reports):
        flow = pb.ServedFlow(tenant_handle="a", total=total, by_this_link=by_this_link, weight=weight)
        with contextlib.suppress(ValueError):
            decoded = served_from_pb([flow])
            weights["a"] = decoded[0].weight
            order.worker_totals.apply("w", "1", [], 0.0)
            order.worker_totals.apply("w", "1", [each.value for each in decoded], float(number))
        assert MIN_WEIGHT <= weights["a"] <= MAX_WEIGHT
        assert math.isfinite(order.counter("a"))


@given(numbers, numbers)
def test_backlogs_are_finite(service: float, weight: float) -> None:
    """The backlog that a gateway reports has a finite cost and a valid weight, or it is refused."""
    with contextlib.suppress(ValueError):
        (decoded,) = flows_from_pb([pb.FlowBacklog(tenant_handle="a", requests=1, service=service, weight=weight)])
        assert decoded.value.flow == FlowKey(0, "a")
        assert math.isfinite(decoded.value.backlog.service / decoded.weight)


@given(numbers)
def test_usage_and_work_are_finite(seconds: float) -> None:
    """The GPU-seconds of a usage record and the busy seconds of an engine are at least 0 and so small that a price of
    them is finite; possible values are kept."""
    for value in (
        usage_from_pb(pb.Usage(gpu_seconds=seconds)).gpu_seconds,
        work_from_pb(pb.Work(busy_s=seconds)).busy_s,
    ):
        assert 0 <= value <= 1e9
        if 0 <= seconds <= 1e9:
            assert value == pytest.approx(seconds)
