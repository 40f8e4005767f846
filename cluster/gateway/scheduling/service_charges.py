"""The service that each sequence is charged: what it is likely to cost, and what it has cost.

policy/fairness/fair_queue.py keeps the accounts; here they meet the gateway's calls. Nothing runs per token: a charge
is made when a sequence is sent, corrected by its first output, a few times a second where it outgrows the prediction,
and at its end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.api.types import WorkerIdentity
from cluster.gateway.calls.call import Call, CallSequence
from cluster.observe.metrics import Metrics
from cluster.policy.fairness.fair_queue import FairOrder, FairOrders
from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.fairness.output_lengths import LearntOutputs
from cluster.policy.fairness.peer_backlog import ServedTotal
from cluster.policy.fairness.token_cost import ServiceWeights
from cluster.wire.fairness_codec import FlowBacklog, WeightedValue

GROWTH_TOKENS = 64
"""A charge follows an sequence beyond its prediction in steps of as many."""
GONE_S = 600.0
"""A worker that has no link for so long does not come back."""
SPEED_DECAY = 0.98
"""What is left of the speed that a model once had, after each second in which it was slower."""


@dataclass(slots=True)
class _Charge:
    """One sequence's charge. `due`: its account is corrected when it has this many tokens."""

    place: WaitingSequence
    due: int = 0
    settled: bool = False


@dataclass(slots=True)
class _Speed:
    """Weighted tokens a second that a model begins here while calls wait for it: the most of late."""

    charged: float = 0.0
    waited: bool = False
    per_s: float = 0.0


class ServiceCharges:
    """The tenants' turns in one gateway, by the handles under which workers know them."""

    def __init__(self, ranks: Mapping[str, int], metrics: Metrics) -> None:
        """`ranks`: those of the priority classes; a class that is not among them is served as the last one."""
        self._ranks = dict(ranks)
        self._last_rank = max(ranks.values(), default=0)
        self._metrics = metrics
        self._service = ServiceWeights()
        self._weights: dict[str, float] = {}
        self.fair = FairOrders(lambda: FairOrder(weight_of=self.weight_of, service=self._service))
        self.learnt = LearntOutputs()
        self._learnt_cached = LearntOutputs(default_tokens=0)
        self._charges: dict[str, _Charge] = {}
        self._speeds: dict[str, _Speed] = {}
        self._gone: dict[tuple[str, str], float] = {}
        self.spreads: dict[str, float] = {}
        """By model, the largest difference between two backlogged tenants' accounts, as of the last second."""

    def weight_of(self, tenant: str) -> float:
        """A tenant's weight, by its handle; 1 until anybody has told it."""
        return self._weights.get(tenant, 1.0)

    def rank_of(self, priority_class: str) -> int:
        """0 is served first."""
        return self._ranks.get(priority_class, self._last_rank)

    # ---- one sequence's life

    def waiting(self, sequence: CallSequence) -> WaitingSequence:
        """How it stands in line; put back, as it did before: what it was charged stays."""
        if (place := self.place(sequence)) is not None:
            return place
        call, tokens = sequence.call, len(sequence.request.prompt_token_ids)
        flow = call.flow
        self._weights[flow] = call.policy.weight
        place = WaitingSequence(
            call_id=sequence.key,
            model=call.model,
            tenant=flow,
            tokens=tokens,
            deadline=call.deadline,
            priority_class=call.policy.priority_class,
            arrived=call.arrived,
            rank=call.rank,
            cached_tokens=self._learnt_cached.mean(flow, call.model, tokens),
            output_tokens=self.learnt.expected(flow, call.model, sequence.request.sampling.max_tokens),
        )
        self._charges[sequence.key] = _Charge(place)
        return place

    def place(self, sequence: CallSequence) -> WaitingSequence | None:
        """How it waits, or waited; None if it never did."""
        charge = self._charges.get(sequence.key)
        return None if charge is None else charge.place

    def began(self, sequence: CallSequence, cached_tokens: int) -> None:
        """Its first sequence has come."""
        call = sequence.call
        self.fair.order(call.model).cached(sequence.key, cached_tokens)
        self._learnt_cached.observe(call.flow, call.model, cached_tokens)

    def grew(self, sequence: CallSequence) -> None:
        """A few times a second for each that runs: nothing to do until it has outgrown what it was charged."""
        tokens, charge = len(sequence.emitted), self._charges.get(sequence.key)
        if charge is not None and tokens >= charge.due:
            self.fair.order(sequence.call.model).generated(sequence.key, tokens)
            charge.due = tokens + GROWTH_TOKENS

    def settle(self, sequence: CallSequence) -> None:
        """Settle the service account of a sequence that has ended. Idempotent."""
        charge = self._charges.get(sequence.key)
        if charge is None or charge.settled:
            return
        charge.settled = True
        call, tokens = sequence.call, len(sequence.emitted)
        order = self.fair.order(call.model)
        if not sequence.computed:
            order.revoked(sequence.key)
            return
        order.generated(sequence.key, tokens)
        order.ended(sequence.key)
        service = self._service.prompt(len(sequence.request.prompt_token_ids), sequence.cached_tokens)
        service += self._service.output * (tokens - sequence.restored)
        self._metrics.count("tenant_service_tokens_total", call.model, call.policy.name, by=service)
        if tokens:
            self.learnt.observe(call.flow, call.model, tokens, cut=sequence.finish_reason == "length")

    def forget(self, sequence: CallSequence) -> None:
        """Its call is over."""
        self._charges.pop(sequence.key, None)

    # ---- what workers report

    def joined(self, worker: WorkerIdentity) -> None:
        """Its link is up."""
        self._gone.pop((worker.model, worker.worker_id), None)

    def left(self, worker: WorkerIdentity, now: float) -> None:
        """Its link has ended; it may come back."""
        self.fair.order(worker.model).link_ended(worker.worker_id)
        self._gone[worker.model, worker.worker_id] = now

    def served(self, worker: WorkerIdentity, totals: Sequence[WeightedValue[ServedTotal]], now: float) -> None:
        """Whom it has served, by whatever gateway."""
        for one in totals:
            self._weights[one.value.tenant] = one.weight
        self.fair.order(worker.model).apply_served_report(
            worker.worker_id, worker.incarnation, [one.value for one in totals], now
        )

    def waiting_elsewhere(
        self, model: str, gateway: str, waiting: Sequence[WeightedValue[FlowBacklog]], now: float
    ) -> None:
        """All that wait for a model at another gateway."""
        for one in waiting:
            self._weights[one.value.flow.tenant] = one.weight
        flows = {one.value.flow: one.value.backlog for one in waiting}
        self.fair.order(model).replace_peer_backlog(gateway, flows, now)

    # ---- time

    def starts_in_s(self, call: Call) -> float:
        """No sooner than that its turn comes: what goes before it in any case, at the model's best speed of late."""
        speed = self._speeds.get(call.model)
        if speed is None or speed.per_s <= 0:
            return 0.0
        return self.fair.order(call.model).service_ahead(call.flow, call.rank) / speed.per_s

    def sweep(self, models: Mapping[str, bool], now: float) -> None:
        """Once a second. `models`: those that there are, and whether a worker serves them."""
        for (model, worker), when in list(self._gone.items()):
            if now - when >= GONE_S:
                del self._gone[model, worker]
                self.fair.order(model).forget_worker(worker)
        self.fair.sweep(now)
        self.fair.retain_models(models)
        self._speeds = {model: speed for model, speed in self._speeds.items() if model in models}
        self.spreads = {}
        for model, served in models.items():
            statistics = self.fair.order(model).statistics()
            self.spreads[model] = statistics.spread
            speed = self._speeds.setdefault(model, _Speed())
            if speed.waited and statistics.waiting and served:
                speed.per_s = max(statistics.charged - speed.charged, speed.per_s * SPEED_DECAY)
            speed.charged, speed.waited = statistics.charged, statistics.waiting > 0

    def __repr__(self) -> str:
        return f"Turns({self.fair}, {len(self._weights)} tenants)"
