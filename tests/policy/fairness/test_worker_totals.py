"""Tests of the totals that workers report: the service that they gave to calls of other gateways."""

from __future__ import annotations

from cluster.policy.fairness.flow_table import FlowTable
from cluster.policy.fairness.peer_backlog import ServedTotal
from cluster.policy.fairness.worker_totals import WorkerTotals


def test_only_what_others_served_is_added_and_only_once() -> None:
    """A worker's report adds to a service counter only the service that it gave to calls of other gateways, and adds
    it once.

    This also holds for repeated and late reports, for a new link and for a restarted worker.
    """
    flows = FlowTable(lambda tenant: 1.0, 2.0, 100.0)
    flow, workers = flows.flow(0, "a"), WorkerTotals(flows)
    report = [ServedTotal(0, "a", 1000.0, 400.0)]
    workers.apply("w", "i1", report, 0.0)
    assert flow.counter == 0.0  # the start of the total is unknown
    for _ in range(2):
        workers.apply("w", "i1", [ServedTotal(0, "a", 1500.0, 600.0)], 1.0)
    assert flow.counter == 300.0
    workers.link_ended("w")
    workers.apply("w", "i1", [ServedTotal(0, "a", 1600.0, 50.0)], 2.0)
    assert flow.counter == 350.0
    workers.apply("w", "i2", [ServedTotal(0, "a", 80.0, 30.0)], 3.0)
    assert flow.counter == 400.0
    workers.link_ended("w")  # the worker gives back what it had predicted for this gateway's calls, as the gateway does
    workers.apply("w", "i2", [ServedTotal(0, "a", 20.0, 0.0)], 4.0)
    assert flow.counter == 400.0
    workers.apply("w", "i2", [ServedTotal(0, "a", 30.0, 0.0)], 5.0)
    assert flow.counter == 410.0


def test_a_forgotten_worker_starts_again() -> None:
    """After a worker was forgotten, its first report only sets the starting point for later reports. The service
    counters stay as they are."""
    flows = FlowTable(lambda tenant: 2.0, 2.0, 100.0)
    flow, workers = flows.flow(0, "a"), WorkerTotals(flows)
    workers.apply("w", "i1", [], 0.0)
    workers.apply("w", "i1", [ServedTotal(0, "a", 80.0, 30.0)], 1.0)
    workers.forget("w")
    workers.apply("w", "i1", [ServedTotal(0, "a", 500.0, 0.0)], 2.0)
    assert flow.counter == 25.0
    assert flows.now == 2.0
