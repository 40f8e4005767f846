"""Data about the other gateways (peers): their backlogs, and the service of the calls that came through them.

Problem: the accounts of tenants must be cluster-wide without another store.

Method: workers see all service, so workers report the service. A report has two numbers for each tenant: the service
since the worker's start, and the part of that service for calls of the gateway that gets the report. The gateway counts
its own part itself, more exactly and sooner, so it adds only the growth of the difference between the two.

Invariants: a repeated report changes nothing. The next report makes up for a lost report. Service before the first
report from a worker to a gateway is not added, because the start of that service is unknown.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cluster.policy.fairness.service_counters import Flow, FlowKey


class Backlog(NamedTuple):
    """Waiting requests of one flow: their number, and their expected cost in weighted tokens."""

    requests: int
    service: float


@dataclass(frozen=True, slots=True)
class ServedTotal:
    """Service of one tenant at one worker since the worker's start: weighted tokens charged, less refunds.

    `total`: calls of all gateways. `by_this_link`: calls that came over the link on which the report is sent.
    """

    rank: int
    tenant: str
    total: float
    by_this_link: float


class WorkerTotals:
    """Last reported totals of every worker."""

    def __init__(self) -> None:
        self._workers: dict[str, tuple[str, dict[FlowKey, tuple[float, float]]]] = {}

    def differences(
        self, worker: str, incarnation: str, totals: Iterable[ServedTotal]
    ) -> Iterator[tuple[FlowKey, float]]:
        """Yield pairs of a flow and its service for calls of other gateways since the last report of the worker.

        The first report of a worker yields nothing; it only sets the starting point.
        """
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
                yield key, difference

    def link_ended(self, worker: str) -> None:
        """Expect `by_this_link` to start at zero, because the next report of the worker comes over a new link."""
        known = self._workers.get(worker)
        if known is not None:
            for key, (total, _) in known[1].items():
                known[1][key] = (total, 0.0)

    def forget(self, worker: str) -> None:
        """Forget a worker that will not come back."""
        self._workers.pop(worker, None)


class PeerBacklogs:
    """Last backlog report of every other gateway."""

    def __init__(self) -> None:
        self._reports: dict[str, tuple[float, Mapping[FlowKey, Backlog]]] = {}

    def replace(self, gateway: str, waiting: Mapping[FlowKey, Backlog], now: float) -> dict[FlowKey, Backlog]:
        """Replace the last report of another gateway. Returns the change between the two reports, by flow."""
        _, before = self._reports.get(gateway, (now, {}))
        self._reports[gateway] = (now, dict(waiting))
        none = Backlog(0, 0.0)
        changes = {}
        for key in {**before, **waiting}:
            old, new = before.get(key, none), waiting.get(key, none)
            if old != new:
                changes[key] = Backlog(new.requests - old.requests, new.service - old.service)
        return changes

    def silent_since(self, when: float) -> dict[FlowKey, Backlog]:
        """Drop gateways without a report since `when`. Returns the dropped backlogs by flow, as negative changes."""
        sums: dict[FlowKey, Backlog] = {}
        for gateway, (reported_at, waiting) in list(self._reports.items()):
            if reported_at < when:
                del self._reports[gateway]
                for key, backlog in waiting.items():
                    requests, service = sums.get(key, (0, 0.0))
                    sums[key] = Backlog(requests - backlog.requests, service - backlog.service)
        return sums

    @staticmethod
    def share_of_turns(flows: Sequence[Flow], turns: int) -> tuple[float, int]:
        """Simulate up to `turns` turns among these flows. Returns this gateway's part of the simulated turns, and the
        number of simulated turns.

        Each turn goes to the flow with the least counter. This gateway's part of a turn is the fraction of the flow's
        waiting sequences that wait here.
        """
        heap = [(f.counter, at, f, f.here + f.elsewhere) for at, f in enumerate(flows)]
        if len(heap) > turns:
            heap = heapq.nsmallest(turns, heap)
        heapq.heapify(heap)
        mine, taken = 0.0, 0
        while heap and taken < turns:
            counter, at, flow, left = heap[0]
            waiting = flow.here + flow.elsewhere
            mine += flow.here / waiting
            taken += 1
            if left > 1:
                step = (flow.here_service + flow.elsewhere_service) / waiting / flow.weight
                heapq.heapreplace(heap, (counter + step, at, flow, left - 1))
            else:
                heapq.heappop(heap)
        return mine, taken
