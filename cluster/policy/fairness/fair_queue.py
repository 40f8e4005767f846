"""Weighted token-fair queuing between tenants, within priority classes, for one model.

Problem: tenants that do not trust each other share workers. A tenant that sends a hundred times its share must not make
other tenants wait, and no capacity may stay idle for the sake of fairness.

Invariants: the next turn goes to the highest class with a waiting sequence on this gateway. Within the class, the turn
goes to the waiting tenant with the least counter (service divided by weight). A counter falls only when an unused
charge is refunded. A tenant that returns from idle starts at the least backlogged counter, so being idle earns no
credit. A call is charged once, however many workers are lost while the call runs.

Source: VTC (Sheng et al., OSDI 2024) for the counters and their lift. docs/tenancy.md says how the counters become
cluster-wide.

Sequences of one tenant are served first come, first served. Callers pass a monotonic `now`, in seconds.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.fairness.peer_backlog import Backlog, PeerBacklogs, ServedTotal, WorkerTotals
from cluster.policy.fairness.reserved_slots import ReservedSlots
from cluster.policy.fairness.service_counters import ClassTurns, Flow, FlowKey
from cluster.policy.fairness.token_cost import Charge, ServiceWeights

IDLE_S = 2.0
DEFICIT_TOKENS = 16_384.0
CLAIM_PICKS = 8
CLAIM_SCALE = 16


def equal(tenant: str) -> float:
    """Return the weight 1 for every tenant."""
    return 1.0


@dataclass(frozen=True, slots=True)
class FairStatistics:
    """Counts of one order.

    `spread` is the largest difference between the counters of two backlogged tenants of one class, in weighted tokens
    divided by weight.
    """

    flows: int
    backlogged: int
    waiting: int
    open_charges: int
    charged: float
    spread: float


class FairOrder:
    """Weighted fair `Order` whose counters persist while nothing waits.

    Every operation takes O(log tenants + log queue length), amortised.
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

        A tenant that was idle for less than `idle_s` may start below the least counter, by at most `deficit_tokens`
        divided by its weight.
        """
        self._weight_of = weight_of
        self._service = service or ServiceWeights()
        self._idle_s = idle_s
        self._deficit_tokens = deficit_tokens
        self._classes: dict[int, ClassTurns] = {}
        self._ranks: list[int] = []
        self._where: dict[str, tuple[Flow, Charge | None, int]] = {}  # flow, pending charge, serial number
        self._returned: list[tuple[int, float, int, WaitingSequence]] = []  # (rank, arrived, number, sequence)
        self._returned_keys: dict[str, tuple[int, float, int]] = {}
        self._returns = 0
        self._open: dict[str, tuple[Flow, Charge]] = {}
        self._reserved_slots = ReservedSlots()
        self._peer_backlogs = PeerBacklogs()
        self._worker_totals = WorkerTotals()
        self._charged = 0.0
        self._now = float("-inf")

    # ---- Order

    def push(self, waiting: WaitingSequence, now: float = 0.0) -> None:
        """Append a sequence to the queue of its tenant. The counter of a tenant that returns from idle is lifted
        first."""
        self._advance(now)
        flow = self._flow(waiting.rank, waiting.tenant)
        charge = Charge(self._service, waiting.tokens, waiting.cached_tokens, waiting.output_tokens)
        self._where[waiting.call_id] = (flow, charge, flow.push(waiting))
        self._change_waiting_here(flow, 1, charge.amount)

    def put_back(self, waiting: WaitingSequence) -> None:
        """Insert a sequence before all sequences that have not had their turn.

        Sequences that were put back are ordered by class, the highest first, then by arrival.
        """
        flow = self._flow(waiting.rank, waiting.tenant)
        self._returns += 1
        key = (waiting.rank, waiting.arrived, self._returns)
        self._returned_keys[waiting.call_id] = key
        insort(self._returned, (*key, waiting))
        charge = None
        if waiting.call_id not in self._open:
            charge = Charge(self._service, waiting.tokens, waiting.cached_tokens, waiting.output_tokens)
        self._where[waiting.call_id] = (flow, charge, -1)
        self._change_waiting_here(flow, 1, 0.0)

    def head(self) -> WaitingSequence | None:
        """The next sequence, or None if nothing waits.

        This is the first sequence that was put back. Otherwise it is the first sequence of the tenant with the least
        counter in the highest waiting class.
        """
        if self._returned:
            return self._returned[0][3]
        for rank in self._ranks:
            flow = self._classes[rank].here.least()
            if flow is not None:
                return flow.head()
        return None

    def remove(self, call_id: str) -> None:
        """Remove a waiting sequence. If the sequence was put back, the unused part of its charge is refunded."""
        self._remove_waiting(call_id)
        self.ended(call_id)

    def mark_taken(self, call_id: str, now: float = 0.0) -> None:
        """Remove a sequence that is sent to a worker. The predicted cost is charged unless the sequence was charged
        before."""
        self._advance(now)
        flow, charge = self._remove_waiting(call_id)
        if charge is not None:
            self._open[call_id] = (flow, charge)
            self._add(flow, charge.amount)

    def position(self, call_id: str) -> int:
        """Number of sequences of the same tenant and class ahead. So a tenant learns nothing about other tenants."""
        flow, _, serial = self._where[call_id]
        key = self._returned_keys.get(call_id)
        end = len(self._returned) if key is None else bisect_left(self._returned, key)
        before = sum(1 for _, _, _, w in self._returned[:end] if (w.rank, w.tenant) == flow.key)
        return before if key is not None else before + flow.position(serial)

    def slots_to_keep_free(self, waiting: WaitingSequence) -> int:
        """Number of slots that must stay free for quiet tenants when this waiting sequence takes its turn."""
        flow, _, serial = self._where[waiting.call_id]
        if serial < 0 or flow.since > self._now - self._idle_s:
            return 0
        return self._reserved_slots.reserved(waiting.rank, len(self._open), self._now)

    # ---- calls that had their turn

    def charge_of(self, call_id: str) -> float:
        """Current charge of a call that had its turn, in weighted tokens. The account of the worker starts with this
        charge."""
        return self._open[call_id][1].amount

    def cached(self, call_id: str, cached_tokens: int) -> None:
        """Correct the charge at the first output by the number of cached prompt tokens. Ignores unknown ids."""
        if (entry := self._open.get(call_id)) is not None:
            self._add(entry[0], entry[1].cached(cached_tokens))

    def generated(self, call_id: str, output_tokens: int) -> None:
        """Record the total number of output tokens so far. Cheap while the total is within the prediction. Ignores
        unknown ids."""
        if (entry := self._open.get(call_id)) is not None and (delta := entry[1].generated(output_tokens)):
            self._add(entry[0], delta)

    def ended(self, call_id: str) -> None:
        """End a call, and refund the charge for predicted tokens that were not generated. Ignores unknown ids.

        The refund does not depend on how the call ended.
        """
        if (entry := self._open.pop(call_id, None)) is not None:
            self._add(entry[0], entry[1].ended())

    def revoked(self, call_id: str) -> None:
        """Refund the whole charge of a call, because no worker accepted the call. Ignores unknown ids."""
        if (entry := self._open.pop(call_id, None)) is not None:
            self._add(entry[0], entry[1].revoked())

    # ---- other gateways

    def apply_served_report(self, worker: str, incarnation: str, totals: Iterable[ServedTotal], now: float) -> None:
        """Apply a report of a worker: add the service for calls of other gateways to the counters."""
        self._advance(now)
        for key, difference in self._worker_totals.differences(worker, incarnation, totals):
            self._add(self._flow(*key), difference)

    def forget_worker(self, worker: str) -> None:
        """Forget the totals of a worker that will not come back. The counters keep the service of that worker."""
        self._worker_totals.forget(worker)

    def link_ended(self, worker: str) -> None:
        """Record that the link to a worker has ended.

        The next report of the worker comes by another link, so the part of this gateway starts at zero.
        """
        self._worker_totals.link_ended(worker)

    def replace_peer_backlog(self, gateway: str, waiting: Mapping[FlowKey, Backlog], now: float) -> None:
        """Replace the backlog of another gateway for this model by a new report."""
        self._advance(now)
        for key, change in self._peer_backlogs.replace(gateway, waiting, now).items():
            flow = self._flow(*key)
            self._change_waiting_elsewhere(flow, change)
        for key, backlog in waiting.items():
            if backlog.requests:
                self._flow(*key).last_waiting = self._now

    def own_backlog(self) -> dict[FlowKey, Backlog]:
        """Backlog of this gateway by flow, to report to the other gateways."""
        return {
            flow.key: Backlog(flow.here, flow.here_service)
            for turns in self._classes.values()
            for flow in turns.here.flows()
        }

    def claimed_turns(self, picks: int = CLAIM_PICKS) -> int:
        """Return the share of this gateway in the next `picks` turns, as if all gateways had one queue.

        The gateway reports this number as its backlog. The unit is 1/CLAIM_SCALE of a turn. The share is at least 1 if
        anything waits on this gateway. `picks` should be about the number of turns between two reports: with more, a
        gateway whose only tenant is first among thousands would get a small part of each credit. The cost is O(tenants
        + picks), so this method is meant for reports and not for every call.
        """
        if not self._where:
            return 0
        mine = float(len(self._returned))
        left = picks - len(self._returned)
        for rank in self._ranks:
            if left <= 0:
                break
            part, taken = self._peer_backlogs.share_of_turns(self._classes[rank].anywhere.flows(), left)
            mine += part
            left -= taken
        return max(1, round(CLAIM_SCALE * mine))

    def sweep(self, now: float) -> None:
        """Forget gateways that are silent for `idle_s`, and idle tenants whose counters are at the floor.

        The caller runs this method once a second. The method also notes tenants that count as guests
        (reserved_slots.py).
        """
        self._advance(now)
        for key, change in self._peer_backlogs.silent_since(now - self._idle_s).items():
            self._change_waiting_elsewhere(self._flow(*key), change)
        charged = Counter(id(flow) for flow, _ in self._open.values())
        floors = {rank: turns.floor() for rank, turns in self._classes.items()}
        for rank, turns in self._classes.items():
            for tenant, flow in list(turns.flows.items()):
                if flow.waits or flow.counter > floors[rank]:
                    continue
                if flow.last_waiting > now - self._idle_s:
                    self._reserved_slots.note_guest(rank, now)
                elif not charged[id(flow)]:
                    del turns.flows[tenant]

    # ---- reading

    def counter(self, tenant: str, rank: int = 0) -> float:
        """Counter of a tenant: weighted service divided by weight, including lifts. 0 for an unknown tenant."""
        flow = self._known(tenant, rank)
        return 0.0 if flow is None else flow.counter

    def service_ahead(self, tenant: str, rank: int = 0) -> float:
        """Number of weighted tokens that are surely ahead of a new sequence of this tenant.

        These are the tokens of higher classes and of the tenant's own queue.
        """
        own = self._known(tenant, rank)
        higher = sum(flow.here_service for r, turns in self._classes.items() if r < rank for flow in turns.here.flows())
        return higher + (own.here_service if own is not None else 0.0)

    def statistics(self) -> FairStatistics:
        """Return the current counts as a frozen value."""
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

    # ---- internals

    def _advance(self, now: float) -> None:
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

    def _remove_waiting(self, call_id: str) -> tuple[Flow, Charge | None]:
        """Remove a waiting sequence. Returns the flow, and the charge or None if the sequence was charged before."""
        flow, charge, serial = self._where.pop(call_id)
        if serial >= 0:
            flow.remove(serial)
            self._change_waiting_here(flow, -1, 0.0 if charge is None else -charge.amount)
        else:
            del self._returned[bisect_left(self._returned, self._returned_keys.pop(call_id))]
            self._change_waiting_here(flow, -1, 0.0)
        return flow, charge

    def _change_waiting_here(self, flow: Flow, change: int, service: float) -> None:
        before, flow.here = flow.here, flow.here + change
        flow.here_service = flow.here_service + service if flow.here else 0.0
        if not before or not flow.here:
            self._update_backlogged(flow, before > 0 or flow.elsewhere > 0)

    def _change_waiting_elsewhere(self, flow: Flow, change: Backlog) -> None:
        before, flow.elsewhere = flow.elsewhere, flow.elsewhere + change.requests
        flow.elsewhere_service = flow.elsewhere_service + change.service if flow.elsewhere else 0.0
        if (before > 0) != (flow.elsewhere > 0):
            self._update_backlogged(flow, before > 0 or flow.here > 0)

    def _update_backlogged(self, flow: Flow, waited: bool) -> None:
        """Update a flow that starts or stops waiting, on this gateway or on other gateways."""
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
            self._classes[flow.key.rank].note_decrease(flow)


class FairOrders:
    """Fair orders of one gateway, by model. The orders and their counters persist while nothing waits."""

    def __init__(self, make: Callable[[], FairOrder] = FairOrder) -> None:
        self._make = make
        self._orders: dict[str, FairOrder] = {}

    def order(self, model: str) -> FairOrder:
        """Return the order of a model. An order is created at first use.

        The waiting room gets this method as `order_of`.
        """
        order = self._orders.get(model)
        if order is None:
            order = self._orders[model] = self._make()
        return order

    def sweep(self, now: float) -> None:
        """Sweep every order. The caller runs this method once a second."""
        for order in self._orders.values():
            order.sweep(now)

    def retain_models(self, models: Iterable[str]) -> None:
        """Forget models that are not listed, unless a sequence of the model waits or has an open charge."""
        known = set(models)
        for model, order in list(self._orders.items()):
            statistics = order.statistics()
            if model not in known and not statistics.waiting and not statistics.open_charges:
                del self._orders[model]

    def __repr__(self) -> str:
        return f"FairTurns({len(self._orders)} models)"
