"""The flows of one model: which flows wait, and how their counters change. A flow is the queue of one tenant in one
class. The counter of a flow is the number of weighted tokens that the flow was served, divided by the tenant's weight.
A flow is backlogged if it has a waiting sequence on any gateway.

Invariants: a counter falls only when an unused charge is refunded. A flow that returns from idle starts at the least
counter of the backlogged flows, so being idle earns no credit. A flow that was idle for less than `idle_s` may start
below this counter, by at most `deficit_tokens` divided by the tenant's weight.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Collection, Iterator

from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.fairness.peer_backlog import Backlog
from cluster.policy.fairness.service_counters import ClassTurns, Flow, FlowKey
from cluster.policy.fairness.warm_order import LossOf, next_of


class FlowTable:
    """The flows of one model. A flow is the queue of one tenant in one class. `now`: the latest time that was passed to
    `advance`. All times are monotonic seconds."""

    def __init__(self, weight_of: Callable[[str], float], idle_s: float, deficit_tokens: float) -> None:
        self._weight_of = weight_of
        self._idle_s = idle_s
        self._deficit_tokens = deficit_tokens
        self._classes: dict[int, ClassTurns] = {}
        self._ranks: list[int] = []
        self.charged = 0.0
        """Sum of the service that was added to the counters, less refunds, in weighted tokens."""
        self.now = float("-inf")

    def __len__(self) -> int:
        return sum(len(turns.flows) for turns in self._classes.values())

    def advance(self, now: float) -> None:
        """Set the current time. An earlier time than the current one is ignored."""
        if now > self.now:
            self.now = now

    def flow(self, rank: int, tenant: str) -> Flow:
        """Return the queue of a tenant in the priority class `rank`, and give the queue the tenant's current weight.
        The queue is created at first use."""
        turns = self._classes.get(rank)
        if turns is None:
            turns = self._classes[rank] = ClassTurns()
            insort(self._ranks, rank)
        flow = turns.flows.get(tenant)
        if flow is None:
            flow = turns.flows[tenant] = Flow(FlowKey(rank, tenant))
        flow.weight = self._weight_of(tenant)
        return flow

    def known(self, tenant: str, rank: int) -> Flow | None:
        """Return the queue of a tenant in a class, or None if there is none."""
        turns = self._classes.get(rank)
        return None if turns is None else turns.flows.get(tenant)

    def classes(self) -> list[ClassTurns]:
        """All priority classes, from the highest priority to the lowest."""
        return [self._classes[rank] for rank in self._ranks]

    def waiting_here(self) -> Iterator[Flow]:
        """Yield the flows that have waiting sequences on this gateway."""
        for turns in self._classes.values():
            yield from turns.here.flows()

    def service_above(self, rank: int) -> float:
        """Return the expected cost of this gateway's waiting sequences in classes above the class `rank`, in weighted
        tokens."""
        return sum(flow.here_service for r, turns in self._classes.items() if r < rank for flow in turns.here.flows())

    def head(self, loss_of: LossOf | None = None, passed: Collection[tuple[int, str]] = ()) -> WaitingSequence | None:
        """Return the sequence whose turn is next, or None if nothing waits.

        The turn goes to the highest waiting class, and in this class to the flow with the lowest counter. Without
        `loss_of`, the flow's first sequence is returned. With `loss_of`, warm_order.py chooses among the flow's
        sequences. `passed`: flows that are passed over.
        """
        for rank in self._ranks:
            here = self._classes[rank].here
            flow = here.least() if not passed else here.least_without(passed)
            if flow is not None:
                return flow.head() if loss_of is None else next_of(flow, loss_of)
        return None

    def add_service(self, flow: Flow, service: float) -> None:
        """Add served tokens to a flow's counter. `service`: weighted tokens; a negative number is a refund."""
        self.charged += service
        flow.counter += service / flow.weight
        if service < 0:
            self._classes[flow.key.rank].note_decrease(flow)

    def change_here(self, flow: Flow, change: int, service: float) -> None:
        """Update a flow after a change of its sequences on this gateway. `change`: change of their number. `service`:
        change of their expected cost."""
        before = flow.here
        flow.here = here = before + change
        if before and here:
            flow.here_service += service
            return
        flow.here_service = service if here else 0.0
        self._update_backlogged(flow, before > 0 or flow.elsewhere > 0)

    def change_elsewhere(self, flow: Flow, change: Backlog) -> None:
        """Update a flow whose sequences on other gateways have changed. `change`: the change of the number of these
        sequences and of their expected cost."""
        before, flow.elsewhere = flow.elsewhere, flow.elsewhere + change.requests
        flow.elsewhere_service = flow.elsewhere_service + change.service if flow.elsewhere else 0.0
        if (before > 0) != (flow.elsewhere > 0):
            self._update_backlogged(flow, before > 0 or flow.here > 0)

    def _update_backlogged(self, flow: Flow, waited: bool) -> None:
        """Update a flow after its sequences began or stopped waiting on any gateway. `waited`: whether the flow had a
        waiting sequence before. If it had none, its service counter is raised to the lowest counter of the waiting
        flows, so that the flow gets no extra turns for its idle time. The counter of a flow that waited a short time
        ago may stay a little below."""
        turns = self._classes[flow.key.rank]
        if not waited:
            floor = turns.floor()
            if flow.last_waiting > self.now - self._idle_s:
                floor -= self._deficit_tokens / flow.weight
            flow.counter = max(flow.counter, floor)
            flow.since = self.now
        flow.last_waiting = self.now
        turns.update(flow)

    def forget_idle(self, charged: Collection[int]) -> list[int]:
        """Forget the idle flows that need not be remembered. Returns one priority rank for each guest.

        A flow is forgotten if it has been idle for `idle_s`, has no open charges, and its counter is at most
        ClassTurns.floor. If such a flow were kept, its counter would be raised to this floor at its next sequence
        anyway.

        A guest (reserved_slots.py) is a flow whose counter is also at most this floor, but which has been idle for less
        than `idle_s`. `charged`: `id()` of each flow with open charges.
        """
        guests = []
        for rank, turns in self._classes.items():
            floor = turns.floor()
            for tenant, flow in list(turns.flows.items()):
                if flow.waits or flow.counter > floor:
                    continue
                if flow.last_waiting > self.now - self._idle_s:
                    guests.append(rank)
                elif id(flow) not in charged:
                    del turns.flows[tenant]
        return guests

    def __repr__(self) -> str:
        return f"FlowTable({len(self)} flows in {len(self._ranks)} classes)"
