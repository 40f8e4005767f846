"""Totals by tenant of the service (weighted tokens) that workers have given to the calls of other gateways.

Problem: the service accounts of tenants must cover all gateways, but the gateways share no store for them.

Method: workers see the calls of all gateways, so workers report the service. A report has two numbers for each
tenant: the service since the worker's start, and the part of it for calls of the gateway that gets the report.
The gateway counts its own part itself, more exactly and sooner. So it adds only the growth of the difference
between the two numbers.

Invariants: a repeated report changes nothing. The next report makes up for a lost report. The first report from
a worker to a gateway adds nothing, because the gateway cannot tell how much of the service is recent. The first report
after a link has ended lowers no counter: with the link, the worker has given back what it had predicted for the
gateway's own calls, and the gateway gives this back itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.policy.fairness.flow_table import FlowTable
from cluster.policy.fairness.peer_backlog import ServedTotal
from cluster.policy.fairness.service_counters import FlowKey


class WorkerTotals:
    """The service totals that each worker of one model last reported, by tenant. When a worker reports higher totals,
    the difference is added to the service counters of the tenants."""

    def __init__(self, flows: FlowTable) -> None:
        self._flows = flows
        self._workers: dict[str, tuple[str, dict[FlowKey, tuple[float, float]]]] = {}
        self._reopened: dict[str, set[FlowKey]] = {}
        """Tenants whose totals a worker has not reported since its last link ended, by worker."""
        self._new: set[str] = set()
        """Workers whose last applied report was their first."""

    def apply(
        self, worker: str, incarnation: str, totals: Iterable[ServedTotal], now: float, *, continues: bool = False
    ) -> None:
        """Apply a worker's report. Add to the counters the service that the worker has given to calls of other
        gateways since its last report. `continues`: whether `totals` are a further part of the last applied report.

        The first report of a worker adds nothing; it only sets the starting point.
        """
        self._flows.advance(now)
        known = self._workers.get(worker)
        first = known is None or (continues and worker in self._new)
        if first:
            self._new.add(worker)
        else:
            self._new.discard(worker)
        if known is None or known[0] != incarnation:
            known = self._workers[worker] = (incarnation, {})
        book, reopened = known[1], self._reopened.get(worker)
        for served in totals:
            key = FlowKey(served.rank, served.tenant)
            total, by_link = book.get(key, (0.0, 0.0))
            if served.by_this_link < by_link and served.by_this_link == 0.0:
                by_link = 0.0  # a new link; the end of the old one was not reported
            book[key] = (served.total, served.by_this_link)
            difference = (served.total - total) - (served.by_this_link - by_link)
            if reopened and key in reopened:
                reopened.remove(key)
                difference = max(difference, 0.0)
            if difference and not first:
                self._flows.add_service(self._flows.flow(*key), difference)

    def link_ended(self, worker: str) -> None:
        """Record that the link to a worker has ended. On the next link, the worker counts the service for calls over
        the link (`by_this_link`) from zero again."""
        known = self._workers.get(worker)
        if known is not None:
            self._reopened[worker] = set(known[1])
            for key, (total, _) in known[1].items():
                known[1][key] = (total, 0.0)

    def forget(self, worker: str) -> None:
        """Forget the totals of a worker that will not come back. The counters are not changed."""
        self._workers.pop(worker, None)
        self._new.discard(worker)
        self._reopened.pop(worker, None)

    def __repr__(self) -> str:
        return f"WorkerTotals({len(self._workers)} workers)"
