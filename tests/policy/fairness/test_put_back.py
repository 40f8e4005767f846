"""Tests of PutBackSequences, which holds the sequences that lost their worker and must start over. They are ordered by
class, then by arrival."""

from __future__ import annotations

import pytest

from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.fairness.put_back import PutBackSequences
from cluster.policy.fairness.service_counters import FlowKey


def waiting(call_id: str, tenant: str, arrived: float, rank: int = 0) -> WaitingSequence:
    """Return a waiting sequence without a deadline."""
    return WaitingSequence(call_id, "m", tenant, 10, None, "standard", arrived, rank)


def test_order_is_by_class_then_arrival() -> None:
    """The head of the queue is the oldest sequence of the highest class. A sequence's position is the number of earlier
    sequences of the same tenant and class."""
    sequences = PutBackSequences()
    for call in (waiting("c", "x", 3.0), waiting("low", "x", 1.0, 1), waiting("a", "y", 1.0), waiting("b", "x", 2.0)):
        sequences.add(call)
    assert [sequences.position(call_id) for call_id in ("a", "b", "c", "low")] == [0, 0, 1, 0]
    assert (sequences.count(FlowKey(0, "x")), sequences.count(FlowKey(1, "y")), len(sequences)) == (2, 0, 4)
    order = []
    while (head := sequences.head()) is not None:
        order.append(head.call_id)
        sequences.remove(head.call_id)
    assert order == ["a", "b", "c", "low"]
    with pytest.raises(KeyError):
        sequences.remove("a")
