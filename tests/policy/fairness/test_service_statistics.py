"""Tests of a model's service statistics: the best recent speed of service, and the wait that is estimated from it."""

from __future__ import annotations

from cluster.policy.fairness.fair_queue import FairOrder, FairOrders
from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.fairness.service_statistics import SPEED_DECAY, ServiceStatistics

MODEL = "m"


def push(order: FairOrder, call_id: str) -> None:
    """Queue a sequence of the tenant t."""
    order.push(WaitingSequence(call_id, MODEL, "t", 100, None, "standard", 0.0))


def test_a_speed_is_measured_while_sequences_wait() -> None:
    """A model's speed is the service that was charged within one second. It is measured only if sequences wait at the
    beginning and at the end of this second.

    In slower seconds the speed decays. While no speed is known, the estimated wait is 0.
    """
    orders = FairOrders()
    order = orders.order(MODEL)
    statistics = ServiceStatistics(orders.order)
    push(order, "first")
    order.mark_taken("first")
    statistics.update({MODEL: True})
    assert statistics.starts_in_s(MODEL, "t", 0) == 0
    push(order, "second")
    push(order, "third")
    statistics.update({MODEL: True})
    before = order.statistics().charged
    order.mark_taken("second")
    statistics.update({MODEL: True})
    speed = order.statistics().charged - before
    ahead = order.backlogs.service_ahead("t")
    assert statistics.starts_in_s(MODEL, "t", 0) == ahead / speed > 0
    statistics.update({MODEL: True})
    assert statistics.starts_in_s(MODEL, "t", 0) == ahead / (speed * SPEED_DECAY)
    assert statistics.spreads == {MODEL: 0.0}
    statistics.update({})
    assert statistics.starts_in_s(MODEL, "t", 0) == 0
    assert not statistics.spreads
