"""A gateway's knowledge of its peers: their backlogs, and the service that their tenants received.

Problem: tenants' accounts must be cluster-wide without another store. Workers see all service, so they report it: for
each tenant a total since the worker's start, and the part of it that came by the link that carries the report. A
gateway knows its own part better and sooner, and adds only the growth of the rest.

Invariants: a repeated report changes nothing; a lost one is made up for by the next; service before a gateway's first
report from a worker is not added, because its start is unknown.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cluster.policy.fairness.service_counters import Flow, FlowKey


class Backlog(NamedTuple):
    """Waiting requests, and the weighted tokens that they are expected to cost."""

    requests: int
    service: float


@dataclass(frozen=True, slots=True)
class ServedTotal:
    """One tenant's service at one worker: weighted tokens charged since the worker's start, net of returned charges."""

    rank: int
    tenant: str
    total: float
    by_this_link: float


class WorkerTotals:
    """The last totals of every worker."""

    def __init__(self) -> None:
        self._workers: dict[str, tuple[str, dict[FlowKey, tuple[float, float]]]] = {}

    def differences(
        self, worker: str, incarnation: str, totals: Iterable[ServedTotal]
    ) -> Iterator[tuple[FlowKey, float]]:
        """Service by other gateways since the worker's last report, by flow.

        The first report of a worker only sets the starting point.
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
        """Restart this gateway's part at zero, because the worker's next report comes by another link."""
        known = self._workers.get(worker)
        if known is not None:
            for key, (total, _) in known[1].items():
                known[1][key] = (total, 0.0)

    def forget(self, worker: str) -> None:
        """Forget a worker that will not come back."""
        self._workers.pop(worker, None)


class PeerBacklogs:
    """The last backlog report of every other gateway."""

    def __init__(self) -> None:
        self._reports: dict[str, tuple[float, Mapping[FlowKey, Backlog]]] = {}

    def replace(self, gateway: str, waiting: Mapping[FlowKey, Backlog], now: float) -> dict[FlowKey, Backlog]:
        """Replace a gateway's report. Returns how the sums over all gateways change."""
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
        """Drop gateways without a report since `when`. Returns how the sums change."""
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
        """This gateway's part of the next `turns` among these flows, the least counter first, and the number of turns
        used."""
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
