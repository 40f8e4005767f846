"""Tests of the claims on capacity that a gateway reports to workers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from cluster.gateway.scheduling.peer_backlog import BacklogReports
from cluster.gateway.scheduling.service_charges import ServiceCharges
from cluster.link.v1 import link_pb2 as pb
from cluster.observe.metrics import Metrics
from cluster.policy.fairness.backlogs import CLAIM_PICKS, CLAIM_SCALE
from cluster.policy.scheduling.resume_queue import ResumeQueue


def test_sequences_that_had_their_turn_are_claimed_where_they_wait() -> None:
    """A gateway whose only sequences wait for certain workers claims capacity of these workers. The claim ends with the
    wait."""
    sent: dict[str, list[pb.Backlog]] = {name: [] for name in "abc"}
    links: Any = [
        SimpleNamespace(
            identity=SimpleNamespace(worker_id=name, incarnation=f"{name}-1"),
            box=SimpleNamespace(backlog=messages.append),
        )
        for name, messages in sent.items()
    ]
    waiting, beside, now = (2, 20), {"a": 2, "b": 100}, 0.0
    reports = BacklogReports(
        ServiceCharges({"standard": 0}, Metrics("test")),
        lambda model: waiting,
        ResumeQueue(1.0),
        lambda model: beside,
        lambda model: links,
        lambda: 2,
        lambda: now,
    )
    reports.joined("m")
    assert {name: messages[-1].claim for name, messages in sent.items()} == {
        "a": 2 * CLAIM_SCALE,
        "b": CLAIM_PICKS * CLAIM_SCALE,
        "c": 0,
    }
    waiting, beside, now = (0, 0), {}, 1.0
    reports.changed("m")
    assert {messages[-1].claim for messages in sent.values()} == {0}
