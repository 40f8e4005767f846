"""Tests of the log of scaling decisions, from which decisions are explained."""

from __future__ import annotations

import pytest

from cluster.api.scaling import ScalingDecision
from cluster.policy.scaling.decision_log import KEPT, DecisionLog, action_of


def test_equal_holds_are_one_decision() -> None:
    """Successive decisions to hold the number of replicas for the same reason are kept as one entry. The entry has the
    newest numbers, and counts the decisions."""
    log = DecisionLog()
    for number in range(3):
        log.add(ScalingDecision(float(number), 1, 1, "hold", "enough", {"load": float(number)}))
    log.add(ScalingDecision(3.0, 1, 1, "hold", "budget"))
    log.add_uncounted(ScalingDecision(4.0, 1, 2, "up", "manual"))
    assert [(one.at_s, one.why, one.passes) for one in log.newest()] == [
        (0.0, "enough", 3),
        (3.0, "budget", 1),
        (4.0, "manual", 1),
    ]
    assert (log.newest()[0].numbers, log.newest(1)[0].why, log.why) == ({"load": 2.0}, "manual", "manual")
    assert log.counts == {"hold": 4}


def test_only_the_newest_decisions_are_kept() -> None:
    """Only the newest KEPT decisions are kept; all decisions are counted."""
    log = DecisionLog()
    assert (log.why, log.newest()) == ("", [])
    for number in range(KEPT + 5):
        log.add(ScalingDecision(float(number), number, number + 1, "up", "demand"))
    assert (len(log.newest()), log.newest()[0].at_s, log.counts) == (KEPT, 5.0, {"up": KEPT + 5})


@pytest.mark.parametrize(
    ("before", "after", "action"),
    [(0, 0, "hold"), (2, 2, "hold"), (0, 1, "from_zero"), (1, 2, "up"), (2, 1, "down"), (1, 0, "to_zero")],
)
def test_actions(before: int, after: int, action: str) -> None:
    """The action of a decision tells whether the number of replicas grows, falls or stays, and whether it starts from
    zero or falls to zero."""
    assert action_of(before, after) == action
