"""A worker's account of whom it has served: what `Served` reports are made of.

Invariant: the total of a flow is the sum of the charges of all calls accepted for it, as each gateway keeps them for
its own; so that all gateways, given all reports, have equal accounts. The meter needs no clock: it is told.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.policy.fairness.peer_backlog import ServedTotal
from cluster.policy.fairness.service_counters import FlowKey
from cluster.policy.fairness.token_cost import Charge


class ServedMeter:
    """By flow, and by the link on which the calls came. A link's number is not used again."""

    def __init__(self) -> None:
        self._totals: dict[FlowKey, float] = {}
        self._by_link: dict[int, dict[FlowKey, float]] = {}
        self._changed: dict[int, set[FlowKey]] = {}
        self._open: dict[str, tuple[int, FlowKey, Charge]] = {}
        self._again: set[str] = set()

    def attach(self, link: int) -> None:
        """A new link: its first report names every flow."""
        self._by_link[link] = {}
        self._changed[link] = set(self._totals)

    def detach(self, link: int) -> None:
        """It ended. Its calls' last corrections still count in the totals."""
        self._by_link.pop(link, None)
        self._changed.pop(link, None)

    def accepted(self, request_id: str, link: int, flow: FlowKey, charge: Charge, *, again: bool = False) -> None:
        """A call came. `again`: another worker has counted it already, only corrections are to come."""
        self._open[request_id] = (link, flow, charge)
        if again:
            self._again.add(request_id)
        else:
            self._add(link, flow, charge.amount)

    def revoked(self, request_id: str) -> None:
        """The engine did not take it after all."""
        if (entry := self._open.pop(request_id, None)) is None:
            return
        if request_id not in self._again:
            self._add(entry[0], entry[1], entry[2].revoked())
        self._again.discard(request_id)

    def cached(self, request_id: str, cached_tokens: int) -> None:
        """With its first output."""
        if (entry := self._open.get(request_id)) is not None:
            self._add(entry[0], entry[1], entry[2].cached(cached_tokens))

    def generated(self, request_id: str, output_tokens: int) -> None:
        """So many in all."""
        if (entry := self._open.get(request_id)) is not None and (delta := entry[2].generated(output_tokens)):
            self._add(entry[0], entry[1], delta)

    def ended(self, request_id: str) -> None:
        """However it ended."""
        if (entry := self._open.pop(request_id, None)) is not None:
            self._again.discard(request_id)
            self._add(entry[0], entry[1], entry[2].ended())

    def report(self, link: int) -> Sequence[ServedTotal]:
        """What changed since the last report on this link."""
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
