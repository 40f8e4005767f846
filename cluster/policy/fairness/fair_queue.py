"""Whose turn it is: weighted token-fair queuing between tenants, within priority classes, for one model.

Problem: tenants who do not trust each other share workers; one that sends a hundred times its share must not make the
others wait, and no room may stay empty for fairness' sake. Invariants: whoever is next has the least counter (service
by weight) of those that wait here, in the highest class that waits; a counter falls only by what was charged in vain;
one that comes back from idle begins at the least backlogged counter, so that idling saves nothing up; a call is
charged once, however many workers it loses.
Source: VTC (Sheng et al., OSDI 2024): counters and their lift; how they are the cluster's stands in docs/tenancy.md.

Within a tenant it is first come, first served. Callers pass one `now` that does not go back, in seconds.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from cluster.policy.fairness.order import Waiting
from cluster.policy.fairness.peer_backlog import Backlog, PeerBacklogs, ServedBooks, ServedTotal
from cluster.policy.fairness.reserved_slots import ReservedSlots
from cluster.policy.fairness.service_counters import ClassTurns, Flow, FlowKey
from cluster.policy.fairness.token_cost import Charge, ServiceWeights

IDLE_S = 2.0
DEFICIT_TOKENS = 16_384.0
CLAIM_PICKS = 8
CLAIM_SCALE = 16


def equal(tenant: str) -> float:
    """Every tenant's weight is 1."""
    return 1.0


@dataclass(frozen=True, slots=True)
class FairStatistics:
    """`spread` is the largest difference between two backlogged counters of one class, in weighted tokens by weight."""

    flows: int
    backlogged: int
    waiting: int
    open_charges: int
    charged: float
    spread: float


class FairOrder:
    """An `Order` that outlives an empty line: counters stay. Every operation is O(log tenants + log line) amortised."""

    def __init__(
        self,
        *,
        weight_of: Callable[[str], float] = equal,
        service: ServiceWeights | None = None,
        idle_s: float = IDLE_S,
        deficit_tokens: float = DEFICIT_TOKENS,
    ) -> None:
        """`deficit_tokens`: how far behind the least, by weight, one may be that was away for less than `idle_s`."""
        self._weight_of = weight_of
        self._service = service or ServiceWeights()
        self._idle_s = idle_s
        self._deficit_tokens = deficit_tokens
        self._classes: dict[int, ClassTurns] = {}
        self._ranks: list[int] = []
        self._where: dict[str, tuple[Flow, Charge | None, int]] = {}  # with the charge to come, and the serial
        self._returned: list[tuple[int, float, int, Waiting]] = []  # (rank, arrived, number, who)
        self._returned_keys: dict[str, tuple[int, float, int]] = {}
        self._returns = 0
        self._open: dict[str, tuple[Flow, Charge]] = {}
        self._guests = ReservedSlots()
        self._elsewhere = PeerBacklogs()
        self._books = ServedBooks()
        self._charged = 0.0
        self._now = float("-inf")

    # ---- Order

    def push(self, waiting: Waiting, now: float = 0.0) -> None:
        """Behind its tenant's others; a tenant that comes back from idle is lifted first."""
        self._hear(now)
        flow = self._flow(waiting.rank, waiting.tenant)
        charge = Charge(self._service, waiting.tokens, waiting.cached_tokens, waiting.output_tokens)
        self._where[waiting.call_id] = (flow, charge, flow.push(waiting))
        self._wait_here(flow, 1, charge.amount)

    def put_back(self, waiting: Waiting) -> None:
        """Before all that have not had their turn, the higher classes first, then by arrival."""
        flow = self._flow(waiting.rank, waiting.tenant)
        self._returns += 1
        key = (waiting.rank, waiting.arrived, self._returns)
        self._returned_keys[waiting.call_id] = key
        insort(self._returned, (*key, waiting))
        charge = None
        if waiting.call_id not in self._open:
            charge = Charge(self._service, waiting.tokens, waiting.cached_tokens, waiting.output_tokens)
        self._where[waiting.call_id] = (flow, charge, -1)
        self._wait_here(flow, 1, 0.0)

    def head(self) -> Waiting | None:
        """Who was put back; else the first of the tenant with the least counter in the highest class that waits."""
        if self._returned:
            return self._returned[0][3]
        for rank in self._ranks:
            flow = self._classes[rank].here.least()
            if flow is not None:
                return flow.head()
        return None

    def remove(self, call_id: str) -> None:
        """It left; one that was put back has no more to come of its charge."""
        self._take_out(call_id)
        self.ended(call_id)

    def taken(self, call_id: str, now: float = 0.0) -> None:
        """It goes to a worker: charge what is predicted, unless it was charged before."""
        self._hear(now)
        flow, charge = self._take_out(call_id)
        if charge is not None:
            self._open[call_id] = (flow, charge)
            self._add(flow, charge.amount)

    def position(self, call_id: str) -> int:
        """How many of its own tenant and class are before it: of the others a tenant learns nothing."""
        flow, _, serial = self._where[call_id]
        key = self._returned_keys.get(call_id)
        end = len(self._returned) if key is None else bisect_left(self._returned, key)
        before = sum(1 for _, _, _, w in self._returned[:end] if (w.rank, w.tenant) == flow.key)
        return before if key is not None else before + flow.position(serial)

    def keep_free(self, waiting: Waiting) -> int:
        """How many places must stay free, for guests, when this one that waits takes its turn."""
        flow, _, serial = self._where[waiting.call_id]
        if serial < 0 or flow.since > self._now - self._idle_s:
            return 0
        return self._guests.places(waiting.rank, len(self._open), self._now)

    # ---- what becomes of those that had their turn

    def charge_of(self, call_id: str) -> float:
        """What a call that had its turn is charged now, in weighted tokens: the worker's account begins with it."""
        return self._open[call_id][1].amount

    def cached(self, call_id: str, cached_tokens: int) -> None:
        """With the first output: how much of the prompt was in the worker's cache. Unknown ids are ignored."""
        if (entry := self._open.get(call_id)) is not None:
            self._add(entry[0], entry[1].cached(cached_tokens))

    def generated(self, call_id: str, output_tokens: int) -> None:
        """So many output tokens in all; cheap while they are within the prediction. Unknown ids are ignored."""
        if (entry := self._open.get(call_id)) is not None and (delta := entry[1].generated(output_tokens)):
            self._add(entry[0], delta)

    def ended(self, call_id: str) -> None:
        """However it ended: what was predicted and not generated is given back. Unknown ids are ignored."""
        if (entry := self._open.pop(call_id, None)) is not None:
            self._add(entry[0], entry[1].ended())

    def revoked(self, call_id: str) -> None:
        """No worker took it and none will: the whole charge is given back. Unknown ids are ignored."""
        if (entry := self._open.pop(call_id, None)) is not None:
            self._add(entry[0], entry[1].revoked())

    # ---- other gateways

    def served(self, worker: str, incarnation: str, totals: Iterable[ServedTotal], now: float) -> None:
        """A worker's report: what others have been served is added to the account."""
        self._hear(now)
        for key, difference in self._books.differences(worker, incarnation, totals):
            self._add(self._flow(*key), difference)

    def worker_gone(self, worker: str) -> None:
        """It will not come back: forget its totals (what it served stays counted)."""
        self._books.forget(worker)

    def link_ended(self, worker: str) -> None:
        """The next report of this worker comes by another link, whose own part begins at zero."""
        self._books.link_ended(worker)

    def waiting_elsewhere(self, gateway: str, waiting: Mapping[FlowKey, Backlog], now: float) -> None:
        """All that waits for this model at another gateway; replaces what it said before."""
        self._hear(now)
        for key, change in self._elsewhere.replace(gateway, waiting, now).items():
            flow = self._flow(*key)
            self._wait_elsewhere(flow, change)
        for key, backlog in waiting.items():
            if backlog.requests:
                self._flow(*key).last_waiting = self._now

    def waiting_here(self) -> dict[FlowKey, Backlog]:
        """What to tell the other gateways."""
        return {
            flow.key: Backlog(flow.here, flow.here_service)
            for turns in self._classes.values()
            for flow in turns.here.flows()
        }

    def claim(self, picks: int = CLAIM_PICKS) -> int:
        """This gateway's part of the next `picks` turns, were they one queue's: what to report as its backlog.

        In CLAIM_SCALE to the turn, and at least 1 where somebody waits here. `picks` should be about as many as there
        are between two reports: with more, one that is first among thousands would get a small part of each credit.
        O(tenants + picks), for reports rather than for each call.
        """
        if not self._where:
            return 0
        mine = float(len(self._returned))
        left = picks - len(self._returned)
        for rank in self._ranks:
            if left <= 0:
                break
            part, taken = self._elsewhere.share_of_turns(self._classes[rank].anywhere.flows(), left)
            mine += part
            left -= taken
        return max(1, round(CLAIM_SCALE * mine))

    def sweep(self, now: float) -> None:
        """Once a second: forget gateways silent for `idle_s`, and tenants who are no more than newcomers; note who of
        them is a guest (reserved_slots.py)."""
        self._hear(now)
        for key, change in self._elsewhere.silent_since(now - self._idle_s).items():
            self._wait_elsewhere(self._flow(*key), change)
        charged = Counter(id(flow) for flow, _ in self._open.values())
        floors = {rank: turns.floor() for rank, turns in self._classes.items()}
        for rank, turns in self._classes.items():
            for tenant, flow in list(turns.flows.items()):
                if flow.waits or flow.counter > floors[rank]:
                    continue
                if flow.last_waiting > now - self._idle_s:
                    self._guests.seen(rank, now)
                elif not charged[id(flow)]:
                    del turns.flows[tenant]

    # ---- what it tells

    def counter(self, tenant: str, rank: int = 0) -> float:
        """Weighted service by weight, with the lifts; 0 for a tenant not known."""
        flow = self._known(tenant, rank)
        return 0.0 if flow is None else flow.counter

    def certain_ahead(self, tenant: str, rank: int = 0) -> float:
        """Weighted tokens that go before a newcomer of this tenant in any case: of the higher classes, and its own."""
        own = self._known(tenant, rank)
        higher = sum(flow.here_service for r, turns in self._classes.items() if r < rank for flow in turns.here.flows())
        return higher + (own.here_service if own is not None else 0.0)

    def statistics(self) -> FairStatistics:
        """Frozen counts."""
        spreads = []
        for turns in self._classes.values():
            counters = [flow.counter for flow in turns.anywhere.flows()]
            spreads.append(max(counters) - min(counters) if counters else 0.0)
        return FairStatistics(
            flows=sum(len(turns.flows) for turns in self._classes.values()),
            backlogged=sum(len(turns.anywhere) for turns in self._classes.values()),
            waiting=len(self._where),
            open_charges=len(self._open),
            charged=self._charged,
            spread=max(spreads, default=0.0),
        )

    def __repr__(self) -> str:
        return f"FairOrder({len(self._where)} waiting, {len(self._ranks)} classes, {len(self._open)} charged)"

    # ---- inside

    def _hear(self, now: float) -> None:
        if now > self._now:
            self._now = now

    def _flow(self, rank: int, tenant: str) -> Flow:
        turns = self._classes.get(rank)
        if turns is None:
            turns = self._classes[rank] = ClassTurns()
            insort(self._ranks, rank)
        flow = turns.flows.get(tenant)
        if flow is None:
            flow = turns.flows[tenant] = Flow(FlowKey(rank, tenant))
        flow.weight = self._weight_of(tenant)
        return flow

    def _known(self, tenant: str, rank: int) -> Flow | None:
        turns = self._classes.get(rank)
        return None if turns is None else turns.flows.get(tenant)

    def _take_out(self, call_id: str) -> tuple[Flow, Charge | None]:
        """Whose it was, and what it is to be charged, unless it has been."""
        flow, charge, serial = self._where.pop(call_id)
        if serial >= 0:
            flow.remove(serial)
            self._wait_here(flow, -1, 0.0 if charge is None else -charge.amount)
        else:
            del self._returned[bisect_left(self._returned, self._returned_keys.pop(call_id))]
            self._wait_here(flow, -1, 0.0)
        return flow, charge

    def _wait_here(self, flow: Flow, change: int, service: float) -> None:
        before, flow.here = flow.here, flow.here + change
        flow.here_service = flow.here_service + service if flow.here else 0.0
        if not before or not flow.here:
            self._turned(flow, before > 0 or flow.elsewhere > 0)

    def _wait_elsewhere(self, flow: Flow, change: Backlog) -> None:
        before, flow.elsewhere = flow.elsewhere, flow.elsewhere + change.requests
        flow.elsewhere_service = flow.elsewhere_service + change.service if flow.elsewhere else 0.0
        if (before > 0) != (flow.elsewhere > 0):
            self._turned(flow, before > 0 or flow.here > 0)

    def _turned(self, flow: Flow, waited: bool) -> None:
        """It waits here, or elsewhere, from now on or no longer."""
        if not waited:
            self._lift(flow)
            flow.since = self._now
        flow.last_waiting = self._now
        self._classes[flow.key.rank].update(flow)

    def _lift(self, flow: Flow) -> None:
        floor = self._classes[flow.key.rank].floor()
        if flow.last_waiting > self._now - self._idle_s:
            floor -= self._deficit_tokens / flow.weight
        flow.counter = max(flow.counter, floor)

    def _add(self, flow: Flow, service: float) -> None:
        self._charged += service
        flow.counter += service / flow.weight
        if service < 0:
            self._classes[flow.key.rank].fell(flow)


class FairTurns:
    """The orders of one gateway, by model. They outlive empty lines, so that a tenant's account does too."""

    def __init__(self, make: Callable[[], FairOrder] = FairOrder) -> None:
        self._make = make
        self._orders: dict[str, FairOrder] = {}

    def order(self, model: str) -> FairOrder:
        """A model's; a new one at its first call. Give this to the waiting room as `order_of`."""
        order = self._orders.get(model)
        if order is None:
            order = self._orders[model] = self._make()
        return order

    def sweep(self, now: float) -> None:
        """Every order's. Once a second."""
        for order in self._orders.values():
            order.sweep(now)

    def keep(self, models: Iterable[str]) -> None:
        """Forget the models that are not among these and for which nobody waits or runs."""
        known = set(models)
        for model, order in list(self._orders.items()):
            statistics = order.statistics()
            if model not in known and not statistics.waiting and not statistics.open_charges:
                del self._orders[model]

    def __repr__(self) -> str:
        return f"FairTurns({len(self._orders)} models)"
