"""Backlogs of one model: the sequences that wait on this gateway, and the backlogs that other gateways (peers) report.

Problem: a tenant that waits on another gateway is not idle, and workers must divide their capacity among the gateways
as if all gateways had one queue.

Invariants: a report of a gateway replaces its last report, so a repeated report changes nothing. The backlog of a
gateway that has become silent is dropped.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from cluster.policy.fairness.flow_table import FlowTable
from cluster.policy.fairness.peer_backlog import Backlog
from cluster.policy.fairness.put_back import PutBackSequences
from cluster.policy.fairness.service_counters import Flow, FlowKey

CLAIM_PICKS = 8
"""Number of turns in a claim: a gateway reports its share of the next CLAIM_PICKS turns."""
CLAIM_SCALE = 16
"""Number of units in one turn, when a gateway reports its share of the next turns."""


MAX_PEERS = 256
"""Maximum number of other gateways whose backlogs are kept; those of further gateways are ignored."""


class ModelBacklogs:
    """Backlogs of one model by tenant and class, on this gateway and on every other gateway."""

    def __init__(self, flows: FlowTable, put_back: PutBackSequences) -> None:
        """`flows`: the queues of the model. `put_back`: sequences that lost their worker and wait ahead of all others
        on this gateway."""
        self._flows = flows
        self._put_back = put_back
        self._peers: dict[str, tuple[float, Mapping[FlowKey, Backlog]]] = {}
        """Time and content of the last report of every other gateway."""

    def replace_peer(self, gateway: str, waiting: Mapping[FlowKey, Backlog], now: float) -> None:
        """Replace the backlog of another gateway by its new report."""
        if gateway not in self._peers and len(self._peers) >= MAX_PEERS:
            return
        flows, none = self._flows, Backlog(0, 0.0)
        flows.advance(now)
        _, before = self._peers.get(gateway, (now, {}))
        self._peers[gateway] = (now, dict(waiting))
        for key in {**before, **waiting}:
            old, new = before.get(key, none), waiting.get(key, none)
            if old != new:
                change = Backlog(new.requests - old.requests, new.service - old.service)
                flows.change_elsewhere(flows.flow(*key), change)
        for key, backlog in waiting.items():
            if backlog.requests:
                flows.flow(*key).last_waiting = flows.now

    def drop_silent(self, when: float) -> None:
        """Drop the backlogs of gateways that have sent no report since `when`."""
        sums: dict[FlowKey, Backlog] = {}
        for gateway, (reported_at, waiting) in list(self._peers.items()):
            if reported_at < when:
                del self._peers[gateway]
                for key, backlog in waiting.items():
                    requests, service = sums.get(key, (0, 0.0))
                    sums[key] = Backlog(requests - backlog.requests, service - backlog.service)
        for key, change in sums.items():
            self._flows.change_elsewhere(self._flows.flow(*key), change)

    def own(self) -> dict[FlowKey, Backlog]:
        """Return what waits on this gateway, by tenant and priority class, to report it to the other gateways."""
        return {flow.key: Backlog(flow.here, flow.here_service) for flow in self._flows.waiting_here()}

    def claimed_turns(self, picks: int = CLAIM_PICKS) -> int:
        """Return this gateway's share of the next `picks` turns (choices of the next sequence), as if all gateways had
        one queue.

        The gateway reports this share to workers as its backlog. The unit is 1/CLAIM_SCALE of a turn; the share is at
        least 1 if anything waits here. `picks` should be about the number of turns between two reports. The cost is
        O(tenants + picks), so the method is meant for reports and not for every call.
        """
        classes = self._flows.classes()
        if not any(len(turns.here) for turns in classes):
            return 0
        mine = float(len(self._put_back))
        left = picks - len(self._put_back)
        for turns in classes:
            if left <= 0:
                break
            part, taken = _share_of_turns(turns.anywhere.flows(), left)
            mine += part
            left -= taken
        return max(1, round(CLAIM_SCALE * mine))

    def service_ahead(self, tenant: str, rank: int = 0) -> float:
        """Return a lower bound on the weighted tokens that are ahead of a new sequence of a tenant on this gateway.

        The bound is the expected cost of the sequences that wait in higher classes and in the tenant's own queue.
        """
        own = self._flows.known(tenant, rank)
        return self._flows.service_above(rank) + (own.here_service if own is not None else 0.0)

    def __repr__(self) -> str:
        return f"ModelBacklogs({len(self._peers)} other gateways)"


def _share_of_turns(flows: Sequence[Flow], turns: int) -> tuple[float, int]:
    """Simulate the next turns among these flows, `turns` at most. Returns this gateway's part of the turns, and
    the number of simulated turns.

    Each turn goes to the flow with the least service counter. This gateway's part of a turn is the fraction of
    the flow's waiting sequences that wait here.
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
