"""Service of the calls of other gateways, which workers report.

Problem: the accounts of tenants must be cluster-wide without another store.

Method: workers see all service, so workers report the service. A report has two numbers for each tenant: the service
since the worker's start, and the part of that service for calls of the gateway that gets the report. The gateway counts
its own part itself, more exactly and sooner, so it adds only the growth of the difference between the two.

Invariants: a repeated report changes nothing. The next report makes up for a lost report. Service before the first
report from a worker to a gateway is not added, because the start of that service is unknown.
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.policy.fairness.flow_table import FlowTable
from cluster.policy.fairness.peer_backlog import ServedTotal
from cluster.policy.fairness.service_counters import FlowKey


class WorkerTotals:
    """Last reported totals of every worker of one model. Each report is added to the counters of the model's flows."""

    def __init__(self, flows: FlowTable) -> None:
        self._flows = flows
        self._workers: dict[str, tuple[str, dict[FlowKey, tuple[float, float]]]] = {}

    def apply(self, worker: str, incarnation: str, totals: Iterable[ServedTotal], now: float) -> None:
        """Apply a report of a worker: add the service for calls of other gateways since the worker's last report.

        The first report of a worker adds nothing; it only sets the starting point.
        """
        self._flows.advance(now)
        known = self._workers.get(worker)
        first = known is None
        if known is None or known[0] != incarnation:
            known = self._workers[worker] = (incarnation, {})
        book = known[1]
        for served in totals:
            key = FlowKey(served.rank, served.tenant)
            total, by_link = book.get(key, (0.0, 0.0))
            if served.by_this_link < by_link and served.by_this_link == 0.0:
                by_link = 0.0  # a new link; the end of the old one was not reported
            book[key] = (served.total, served.by_this_link)
            difference = (served.total - total) - (served.by_this_link - by_link)
            if difference and not first:
                self._flows.add_service(self._flows.flow(*key), difference)

    def link_ended(self, worker: str) -> None:
        """Record that the link to a worker has ended. The worker's next report comes over a new link, on which
        `by_this_link` starts at zero."""
        known = self._workers.get(worker)
        if known is not None:
            for key, (total, _) in known[1].items():
                known[1][key] = (total, 0.0)

    def forget(self, worker: str) -> None:
        """Forget the totals of a worker that will not come back. The counters keep the service of that worker."""
        self._workers.pop(worker, None)

    def __repr__(self) -> str:
        return f"WorkerTotals({len(self._workers)} workers)"
