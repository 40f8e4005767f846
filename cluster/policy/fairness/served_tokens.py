"""Account of a worker: the service (weighted tokens) that each tenant received in each class. `Served` reports are made
from this account.

Invariant: the total of a tenant in a class is the sum of the charges of all its accepted calls. Workers and gateways
compute a call's charge in the same way, so all gateways that have all reports have equal accounts. The account uses no
clock.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.policy.fairness.peer_backlog import ServedTotal
from cluster.policy.fairness.service_counters import FlowKey
from cluster.policy.fairness.token_cost import Charge


class ServedMeter:
    """Service (weighted tokens) that a worker has given, by tenant and class. There is one sum for the calls of all
    links, and for each link one sum for the calls of this link. The number of a link is never reused."""

    def __init__(self) -> None:
        self._totals: dict[FlowKey, float] = {}
        self._by_link: dict[int, dict[FlowKey, float]] = {}
        self._changed: dict[int, set[FlowKey]] = {}
        self._open: dict[str, tuple[int, FlowKey, Charge]] = {}
        self._resumed: set[str] = set()

    def attach(self, link: int) -> None:
        """Add a new link. The first report on it will contain every tenant and class."""
        self._by_link[link] = {}
        self._changed[link] = set(self._totals)

    def detach(self, link: int) -> None:
        """Remove a link that has ended. Later corrections for calls from this link still count in the totals."""
        self._by_link.pop(link, None)
        self._changed.pop(link, None)

    def accepted(self, request_id: str, link: int, flow: FlowKey, charge: Charge, *, again: bool = False) -> None:
        """Record a call that the worker has accepted, with its charge.

        `again`: True for a resumed call. Its first charge was counted by the worker that ran it before, so only
        later changes of the charge are counted here.
        """
        self._open[request_id] = (link, flow, charge)
        if again:
            self._resumed.add(request_id)
        else:
            self._add(link, flow, charge.amount)

    def revoked(self, request_id: str) -> None:
        """Refund the charge of a call, because the engine has refused the call after it was charged."""
        if (entry := self._open.pop(request_id, None)) is None:
            return
        if request_id not in self._resumed:
            self._add(entry[0], entry[1], entry[2].revoked())
        self._resumed.discard(request_id)

    def cached(self, request_id: str, cached_tokens: int) -> None:
        """Correct the charge of a call at its first output. `cached_tokens`: number of prompt tokens that were really
        in the engine's cache."""
        if (entry := self._open.get(request_id)) is not None:
            self._add(entry[0], entry[1], entry[2].cached(cached_tokens))

    def generated(self, request_id: str, output_tokens: int) -> None:
        """Record the number of output tokens of a call so far."""
        if (entry := self._open.get(request_id)) is not None and (delta := entry[2].generated(output_tokens)):
            self._add(entry[0], entry[1], delta)

    def ended(self, request_id: str) -> None:
        """End a call, whatever the reason, and refund the charge for predicted tokens that were not generated."""
        if (entry := self._open.pop(request_id, None)) is not None:
            self._resumed.discard(request_id)
            self._add(entry[0], entry[1], entry[2].ended())

    def report(self, link: int) -> Sequence[ServedTotal]:
        """Return the service totals that have changed since the last report on this link."""
        mine = self._by_link[link]
        changed, self._changed[link] = self._changed[link], set()
        return [ServedTotal(key.rank, key.tenant, self._totals[key], mine.get(key, 0.0)) for key in sorted(changed)]

    def _add(self, link: int, flow: FlowKey, service: float) -> None:
        self._totals[flow] = self._totals.get(flow, 0.0) + service
        if (mine := self._by_link.get(link)) is not None:
            mine[flow] = mine.get(flow, 0.0) + service
        for changed in self._changed.values():
            changed.add(flow)

    def __repr__(self) -> str:
        return f"ServedMeter({len(self._totals)} flows, {len(self._open)} calls, {len(self._by_link)} links)"
