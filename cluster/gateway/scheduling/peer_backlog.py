"""Reports of a gateway's queues to workers. Every worker gets the gateway's claim on capacity, and some workers also
get the backlogs of the gateway's tenants.

A claim is this gateway's share of the sequences that would be sent next if all gateways had one queue
(ModelBacklogs.claimed_turns). Sequences that had their turn and wait for certain workers are added to the claims on
these workers, twice a second. Each worker divides its capacity among the gateways in proportion to their claims. A
queue that becomes empty or non-empty is therefore reported at once, and other changes a few times a second.

Workers forward the backlogs to the other gateways. Two forwarding workers suffice, because the next report replaces a
lost report. If workers connect to some gateways only, each report is forwarded by more workers, and the next report is
forwarded by other workers. Backlogs are repeated every half second, because gateways forget the backlogs of a gateway
that does not report.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.scheduling.service_charges import ServiceCharges
from cluster.policy.fairness.backlogs import CLAIM_PICKS, CLAIM_SCALE
from cluster.policy.fairness.peer_backlog import Backlog
from cluster.policy.fairness.service_counters import FlowKey
from cluster.policy.routing.gateway_subset import ALL_UP_TO
from cluster.policy.scheduling.resume_queue import ResumeQueue
from cluster.wire.codecs.fairness_codec import FlowBacklog, WeightedValue, backlog_to_pb

REPORT_S = 0.1
REPEAT_S = 0.5
FORWARDING_WORKERS = 2
FORWARDED_TIMES = 4
"""Average number of forwarding workers that are linked to a given gateway, if workers connect to some gateways only."""
FLOWS_A_REPORT = 1000
"""Largest number of flows with which backlogs may be reported every REPORT_S. With more flows, the interval grows in
proportion to their number."""


@dataclass(slots=True)
class _Reported:
    """Last report of this gateway to the workers about one model. `waits`: whether any sequence waited then."""

    waits: bool = False
    claim: int = 0
    cached: Mapping[str, int] = field(default_factory=dict)
    beside: Mapping[str, int] = field(default_factory=dict)
    beside_at: float = float("-inf")
    flows: dict[FlowKey, Backlog] = field(default_factory=dict)
    flows_at: float = float("-inf")


_NOTHING = _Reported()


class BacklogReports:
    """Reporter of one gateway's claims on capacity and of its backlogs, for all models."""

    def __init__(
        self,
        charges: ServiceCharges,
        waiting: Callable[[str], tuple[int, int]],
        resumed: ResumeQueue,
        beside: Callable[[str], Mapping[str, int]],
        links: Callable[[str], Sequence[WorkerLink]],
        gateways: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`waiting`: returns the number of a model's waiting sequences and the number of their tokens; both include the
        queue `resumed`. `beside`: returns, by worker id, how many of these sequences had their turn and wait for the
        worker. `links`: returns the links to a model's workers, ordered by worker id. `gateways`: returns the
        number of gateways; 0 if it is unknown."""
        self._charges = charges
        self._waiting = waiting
        self._resumed = resumed
        self._beside = beside
        self._links = links
        self._gateways = gateways
        self._clock = clock
        self._reported: dict[str, _Reported] = {}
        self._forwarded = 0
        """Index of the first worker that forwards the next report, if workers connect to some gateways only."""

    def changed(self, model: str) -> None:
        """Handle a change of a model's queues. A report is sent at once if the queues became empty or non-empty, or if
        the number of sequences whose KV blocks a worker holds has changed."""
        reported = self._reported.get(model, _NOTHING)
        if reported.waits != (self._waiting(model)[0] > 0) or (reported.cached != self._resumed.cached_counts(model)):
            self._report(model, self._clock())

    def joined(self, model: str) -> None:
        """Report all queues of a model again, because a new worker of the model has joined and has had no report
        yet."""
        self._reported.pop(model, None)
        self.changed(model)

    async def watch(self) -> None:
        """Report the gateway's claims on capacity and its backlogs to the workers, periodically. Runs until
        cancelled."""
        while True:
            await asyncio.sleep(REPORT_S)
            now = self._clock()
            for model in list(self._reported):
                self._report(model, now)

    def _report(self, model: str, now: float) -> None:
        reported = self._reported.setdefault(model, _Reported())
        count, tokens = self._waiting(model)
        reported.waits = count > 0
        order = self._charges.fair.order(model)
        claim = order.backlogs.claimed_turns() + self._resumed.waiting(model)[0] if count else 0
        cached, beside = dict(self._resumed.cached_counts(model)), reported.beside
        if now - reported.beside_at >= REPEAT_S or not count:
            beside, reported.beside_at = self._beside(model) if count else {}, now
        flows: list[WeightedValue[FlowBacklog]] | None = None
        if now - reported.flows_at >= REPORT_S * len(reported.flows) / FLOWS_A_REPORT or not count:
            own = order.backlogs.own() if count else {}
            if own != reported.flows or (own and now - reported.flows_at >= REPEAT_S):
                reported.flows, reported.flows_at = own, now
                flows = [
                    WeightedValue(FlowBacklog(*item), self._charges.weight_of(item[0].tenant)) for item in own.items()
                ]
        if (claim, cached, beside) == (reported.claim, reported.cached, reported.beside) and flows is None:
            if not count:
                del self._reported[model]
            return
        reported.claim, reported.cached, reported.beside = claim, cached, beside
        links = self._links(model)
        first, forwarding = 0, FORWARDING_WORKERS
        if flows is not None and (gateways := self._gateways()) > ALL_UP_TO:
            forwarding = FORWARDED_TIMES * gateways // ALL_UP_TO
            first, self._forwarded = self._forwarded % max(len(links), 1), self._forwarded + forwarding
        for number, link in enumerate(links):
            cached_here = cached.get(link.identity.incarnation, 0)
            forwarded = flows if (number - first) % len(links) < forwarding else None
            claim_here = claim + CLAIM_SCALE * min(beside.get(link.identity.worker_id, 0), CLAIM_PICKS)
            link.box.backlog(backlog_to_pb(count, tokens, claim_here, cached_here, forwarded))

    def __repr__(self) -> str:
        return f"BacklogReports({len(self._reported)} models)"
