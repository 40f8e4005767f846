"""Weighted token-fair queuing between tenants, within priority classes, for one model.

Problem: tenants that do not trust each other share workers. A tenant that sends a hundred times its share must not make
other tenants wait, and no capacity may stay idle for the sake of fairness.

Method: each tenant has a counter for each class: the weighted tokens that it was served, divided by the tenant's
weight. A turn is the choice of the next sequence. It goes to the highest class with a waiting sequence on this gateway,
and within the class to the waiting tenant with the least counter.

Invariants: a counter falls only when an unused charge is refunded. A tenant that returns from idle starts at the least
counter of the backlogged tenants, so being idle earns no credit. A call is charged once, however many workers are lost
while the call runs.

Source: VTC (Sheng et al., OSDI 2024) for the counters, and for the raise of a counter after an idle time (lift).
docs/tenancy.md says how the counters become cluster-wide.

Sequences of one tenant are served first come, first served, or in the order of warm_order.py. Callers pass a monotonic
`now`, in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from cluster.policy.fairness.backlogs import ModelBacklogs
from cluster.policy.fairness.flow_table import FlowTable
from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.fairness.put_back import PutBackSequences
from cluster.policy.fairness.reserved_slots import ReservedSlots
from cluster.policy.fairness.service_counters import ClassTurns, Flow
from cluster.policy.fairness.token_cost import Charge, ServiceWeights
from cluster.policy.fairness.warm_order import LossOf
from cluster.policy.fairness.worker_totals import WorkerTotals

IDLE_S = 2.0
"""Time in seconds after which a tenant without waiting sequences counts as idle."""
DEFICIT_TOKENS = 16_384.0
"""Default limit in weighted tokens. After a short idle time, a tenant's counter may start below the least counter by at
most this limit divided by the tenant's weight."""


def equal(tenant: str) -> float:
    """Return the weight 1, for any tenant."""
    return 1.0


@dataclass(frozen=True, slots=True)
class FairStatistics:
    """Statistics of one fair order, at one time.

    `spread`: largest difference between the counters of two backlogged tenants of one class. A counter is in
    weighted tokens divided by the tenant's weight.
    """

    flows: int
    backlogged: int
    waiting: int
    open_charges: int
    charged: float
    spread: float


class FairOrder:
    """Weighted fair order of one model's sequences. Its counters persist while nothing waits.

    Reports of other gateways are applied through `backlogs`, and reports of workers through `worker_totals`. Every
    operation takes O(log tenants + log queue length), amortised.
    """

    def __init__(
        self,
        *,
        weight_of: Callable[[str], float] = equal,
        service: ServiceWeights | None = None,
        idle_s: float = IDLE_S,
        deficit_tokens: float = DEFICIT_TOKENS,
    ) -> None:
        """Create an order without sequences.

        When an idle tenant sends again, its counter is raised to the least counter of the backlogged tenants. If it was
        idle for less than `idle_s`, its counter may stay below this value, by at most `deficit_tokens` divided by its
        weight.
        """
        self._service = service or ServiceWeights()
        self._idle_s = idle_s
        self._flows = FlowTable(weight_of, idle_s, deficit_tokens)
        self._where: dict[str, tuple[Flow, Charge | None, int]] = {}  # flow, pending charge, serial number
        self._put_back = PutBackSequences()
        self._open: dict[str, tuple[Flow, Charge]] = {}
        self._reserved_slots = ReservedSlots()
        self.backlogs = ModelBacklogs(self._flows, self._put_back)
        self.worker_totals = WorkerTotals(self._flows)

    # ---- Order

    def push(self, waiting: WaitingSequence, now: float = 0.0) -> None:
        """Append a sequence to the queue of its tenant. If the tenant was idle, the tenant's service counter is first
        raised, so that idle time earns no advantage (see `__init__`)."""
        flows = self._flows
        flows.advance(now)
        flow = flows.flow(waiting.rank, waiting.tenant)
        charge = Charge(self._service, waiting.tokens, waiting.cached_tokens, waiting.output_tokens)
        self._where[waiting.call_id] = (flow, charge, flow.push(waiting))
        flows.change_here(flow, 1, charge.amount)

    def put_back(self, waiting: WaitingSequence) -> None:
        """Put back a sequence that was sent and lost its worker. It waits ahead of all sequences that were never sent.

        Sequences that were put back are ordered by class, the highest first, then by arrival.
        """
        flow = self._flows.flow(waiting.rank, waiting.tenant)
        self._put_back.add(waiting)
        charge = None
        if waiting.call_id not in self._open:
            charge = Charge(self._service, waiting.tokens, waiting.cached_tokens, waiting.output_tokens)
        self._where[waiting.call_id] = (flow, charge, -1)
        self._flows.change_here(flow, 1, 0.0)

    def replace(self, waiting: WaitingSequence) -> None:
        """Replace the entry of a waiting sequence, which keeps its place and its charge."""
        flow, _, serial = self._where[waiting.call_id]
        if serial < 0:
            self._put_back.replace(waiting)
        else:
            flow.replace(serial, waiting)

    def head(self, loss_of: LossOf | None = None, passed: Collection[tuple[int, str]] = ()) -> WaitingSequence | None:
        """Return the next sequence, or None if nothing waits.

        Sequences that were put back come first. After them, it is the turn of the tenant with the least counter in the
        highest waiting class. The tenant's first sequence is returned, or with `loss_of` the one that warm_order.py
        chooses. `passed`: flows that are passed over.
        """
        return (self._put_back.head(passed) if self._put_back else None) or self._flows.head(loss_of, passed)

    def remove(self, call_id: str) -> None:
        """Remove a sequence that will not be sent. If it was charged and then put back, the unused charge is
        refunded."""
        self._remove_waiting(call_id)
        self.ended(call_id)

    def mark_taken(self, call_id: str, now: float = 0.0) -> None:
        """Remove a sequence that is being sent to a worker. Its predicted cost is charged, except if it was charged
        before."""
        self._flows.advance(now)
        flow, charge = self._remove_waiting(call_id, taken=True)
        if charge is not None:
            self._open[call_id] = (flow, charge)
            self._flows.add_service(flow, charge.amount)

    def position(self, call_id: str) -> int:
        """Return how many sequences of the same tenant and class are ahead of a waiting sequence. Sequences of other
        tenants are not counted, so nothing is revealed about them."""
        flow, _, serial = self._where[call_id]
        if serial < 0:
            return self._put_back.position(call_id)
        return self._put_back.count(flow.key) + flow.position(serial)

    def slots_to_keep_free(self, waiting: WaitingSequence, beside: int = 0) -> int:
        """Return how many slots must stay free for tenants that send little, if this waiting sequence is sent next.
        `beside`: number of sequences that had their turn and still wait for a certain worker, so that they fill no
        slot."""
        flow, _, serial = self._where[waiting.call_id]
        if serial < 0 or flow.since > self._flows.now - self._idle_s:
            return 0
        return self._reserved_slots.reserved(waiting.rank, max(len(self._open) - beside, 0), self._flows.now)

    # ---- calls that had their turn

    def cached(self, call_id: str, cached_tokens: int) -> None:
        """Correct the charge of a call at its first output. `cached_tokens`: number of prompt tokens that were really
        in the worker's cache. Unknown ids are ignored."""
        if (entry := self._open.get(call_id)) is not None:
            self._flows.add_service(entry[0], entry[1].cached(cached_tokens))

    def generated(self, call_id: str, output_tokens: int) -> None:
        """Record the number of output tokens of a call so far. This is cheap while the number is within the prediction.
        Unknown ids are ignored."""
        if (entry := self._open.get(call_id)) is not None and (delta := entry[1].generated(output_tokens)):
            self._flows.add_service(entry[0], delta)

    def ended(self, call_id: str) -> None:
        """End a call, and refund the charge for predicted tokens that were not generated. Unknown ids are ignored.

        The refund does not depend on how the call ended.
        """
        if (entry := self._open.pop(call_id, None)) is not None:
            self._flows.add_service(entry[0], entry[1].ended())

    def revoked(self, call_id: str) -> None:
        """Refund the whole charge of a call, because no worker accepted it. Unknown ids are ignored."""
        if (entry := self._open.pop(call_id, None)) is not None:
            self._flows.add_service(entry[0], entry[1].revoked())

    # ---- time

    def sweep(self, now: float) -> None:
        """Forget gateways that are silent for `idle_s`, and idle tenants that need no memory (FlowTable.forget_idle).
        Also note the priority classes that must keep slots for tenants that became idle recently
        (reserved_slots.py).

        The caller runs this method once a second.
        """
        self._flows.advance(now)
        self.backlogs.drop_silent(now - self._idle_s)
        for rank in self._flows.forget_idle({id(flow) for flow, _ in self._open.values()}):
            self._reserved_slots.note_guest(rank, now)

    # ---- reading

    def counter(self, tenant: str, rank: int = 0) -> float:
        """Return the counter by which a tenant is ordered among the tenants; 0 for an unknown tenant. The counter is
        the tenant's weighted service divided by its weight, plus the amounts that were added after idle times. `rank`:
        the priority class."""
        flow = self._flows.known(tenant, rank)
        return 0.0 if flow is None else flow.counter

    def statistics(self) -> FairStatistics:
        """Return a snapshot of the numbers of this order."""
        return FairStatistics(
            flows=len(self._flows),
            backlogged=sum(len(turns.anywhere) for turns in self._flows.classes()),
            waiting=len(self._where),
            open_charges=len(self._open),
            charged=self._flows.charged,
            spread=max(map(_spread, self._flows.classes()), default=0.0),
        )

    def __repr__(self) -> str:
        return f"FairOrder({len(self._where)} waiting, {len(self._flows.classes())} classes, {len(self._open)} charged)"

    def _remove_waiting(self, call_id: str, *, taken: bool = False) -> tuple[Flow, Charge | None]:
        """Remove a waiting sequence. Returns its flow, and the charge to count when the sequence is sent; the charge is
        None if it was counted before. `taken`: whether the sequence is removed because it is sent."""
        flow, charge, serial = self._where.pop(call_id)
        if serial >= 0:
            if taken:
                flow.record_turn(serial)
            flow.remove(serial)
            self._flows.change_here(flow, -1, 0.0 if charge is None else -charge.amount)
        else:
            self._put_back.remove(call_id)
            self._flows.change_here(flow, -1, 0.0)
        return flow, charge


def _spread(turns: ClassTurns) -> float:
    counters = [flow.counter for flow in turns.anywhere.flows()]
    return max(counters) - min(counters) if counters else 0.0


class FairOrders:
    """The fair orders of one gateway, one for each model. An order and its counters are kept even while no sequence of
    the model waits."""

    def __init__(self, make: Callable[[], FairOrder] = FairOrder) -> None:
        self._make = make
        self._orders: dict[str, FairOrder] = {}

    def order(self, model: str) -> FairOrder:
        """Return the order of a model, created at first use.

        Gateways pass this method to the waiting room as `order_of`.
        """
        order = self._orders.get(model)
        if order is None:
            order = self._orders[model] = self._make()
        return order

    def sweep(self, now: float) -> None:
        """Call FairOrder.sweep for each model. The caller runs this method once a second."""
        for order in self._orders.values():
            order.sweep(now)

    def retain_models(self, models: Iterable[str]) -> None:
        """Forget the orders of models that are not in `models`. An order that still has a waiting sequence or an
        unsettled charge is kept."""
        known = set(models)
        for model, order in list(self._orders.items()):
            statistics = order.statistics()
            if model not in known and not statistics.waiting and not statistics.open_charges:
                del self._orders[model]

    def __repr__(self) -> str:
        return f"FairOrders({len(self._orders)} models)"
