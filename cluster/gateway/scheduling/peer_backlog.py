"""What a gateway tells of its lines: to every worker what part of the next turns it claims, to some of them who waits.

Room is shared out by claims, so that a line begun or ended is told at once; the rest a few times a second, and who
waits again every half second, since gateways that fall silent are forgotten. Workers hand that on to the other
gateways; two of them suffice, since the next report makes up for a lost one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.scheduling.resume_queue import ResumeQueue
from cluster.gateway.scheduling.service_charges import ServiceCharges
from cluster.policy.fairness.peer_backlog import Backlog
from cluster.policy.fairness.service_counters import FlowKey
from cluster.process import ticks
from cluster.wire.fairness_codec import FlowBacklog, WeightedValue, backlog_to_pb

REPORT_S = 0.1
REPEAT_S = 0.5
RELAYS = 2
FLOWS_A_REPORT = 1000
"""With more tenants waiting than this, who waits is told more seldom in proportion."""


@dataclass(slots=True)
class _Told:
    claim: int = 0
    kept: Mapping[str, int] = field(default_factory=dict)
    flows: dict[FlowKey, Backlog] = field(default_factory=dict)
    flows_at: float = float("-inf")


_NOTHING = _Told()


class BacklogReports:
    """Of all models."""

    def __init__(
        self,
        turns: ServiceCharges,
        waiting: Callable[[str], tuple[int, int]],
        returning: ResumeQueue,
        links: Callable[[str], Sequence[WorkerLink]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`waiting` gives a model's waiting sequences and prompt tokens, `returning` holds those among them that go on
        before all others wherever they wait, `links` gives those of its workers, by their ids."""
        self._turns = turns
        self._waiting = waiting
        self._returning = returning
        self._links = links
        self._clock = clock
        self._told: dict[str, _Told] = {}

    def changed(self, model: str) -> None:
        """Something has entered or left a line: told at once if the line begins or ends by it, or if it is one that
        some worker has computed, and takes back for the asking."""
        told = self._told.get(model, _NOTHING)
        if (told.claim > 0) != (self._waiting(model)[0] > 0) or told.kept != self._returning.cached_counts(model):
            self._tell(model, self._clock())

    def joined(self, model: str) -> None:
        """A worker knows nothing yet."""
        self._told.pop(model, None)
        self.changed(model)

    async def watch(self) -> None:
        """Report what waits, until cancelled."""
        while True:
            await ticks.sleep_to_tick(REPORT_S)
            now = self._clock()
            for model in list(self._told):
                self._tell(model, now)

    def _tell(self, model: str, now: float) -> None:
        told = self._told.setdefault(model, _Told())
        count, tokens = self._waiting(model)
        order = self._turns.fair.order(model)
        claim = order.claimed_turns() + self._returning.waiting(model)[0] if count else 0
        kept = dict(self._returning.cached_counts(model))
        flows: list[WeightedValue[FlowBacklog]] | None = None
        if now - told.flows_at >= REPORT_S * len(told.flows) / FLOWS_A_REPORT or not count:
            mine = order.own_backlog() if count else {}
            if mine != told.flows or (mine and now - told.flows_at >= REPEAT_S):
                told.flows, told.flows_at = mine, now
                flows = [
                    WeightedValue(FlowBacklog(*item), self._turns.weight_of(item[0].tenant)) for item in mine.items()
                ]
        if (claim, kept) == (told.claim, told.kept) and flows is None:
            if not count:
                del self._told[model]
            return
        told.claim, told.kept = claim, kept
        for at, link in enumerate(self._links(model)):
            here = kept.get(link.identity.incarnation, 0)
            link.box.backlog(backlog_to_pb(count, tokens, claim, here, flows if at < RELAYS else None))

    def __repr__(self) -> str:
        return f"Backlogs({len(self._told)} models)"
