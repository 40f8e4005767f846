"""Service charges for a gateway's sequences: first the predicted cost, later the actual cost. Fairness between tenants
is measured by these charges.

policy/fairness/fair_queue.py keeps the tenants' accounts. This module enters the charges for the gateway's calls.
Nothing runs per token. A charge is made when a sequence is sent. The charge is corrected at the sequence's first
output, a few times a second while the output exceeds the prediction, and at the sequence's end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cluster.api.types import WorkerIdentity
from cluster.gateway.calls.call import Call, CallSequence
from cluster.gateway.calls.sequences.linked_sequence import LinkedSequence
from cluster.observe.metrics import Metrics
from cluster.policy.fairness.fair_queue import FairOrder, FairOrders
from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.fairness.output_lengths import LearntMeans, LearntOutputs
from cluster.policy.fairness.peer_backlog import ServedTotal
from cluster.policy.fairness.service_statistics import ServiceStatistics
from cluster.policy.fairness.token_cost import ServiceWeights
from cluster.wire.codecs.fairness_codec import FlowBacklog, WeightedValue

GROWTH_TOKENS = 64
"""Number of tokens after which the charge of a sequence is corrected again, once the output exceeds the prediction."""
MAX_STRANGERS = 256
"""Maximum number of handles in reports of workers that this gateway does not know."""
GONE_S = 600.0
"""Seconds without a link after which a worker is forgotten."""


@dataclass(slots=True)
class _Charge:
    """The charge of one sequence. `due`: number of tokens at which the charge is corrected next."""

    place: WaitingSequence
    due: int = 0
    settled: bool = False


class ServiceCharges:
    """Charges each tenant's fair-share account for the tokens that the tenant is served, on one gateway. Tenants are
    identified by their handles, the names by which workers know them."""

    def __init__(
        self,
        ranks: Mapping[str, int],
        metrics: Metrics,
        known_weight: Callable[[str], float | None] = lambda handle: None,
    ) -> None:
        """`ranks`: the rank of each priority class. An unknown class gets the last rank. `known_weight`: returns the
        weight of the tenant with a handle; None if this gateway knows no such tenant."""
        self._ranks = dict(ranks)
        self._last_rank = max(ranks.values(), default=0)
        self._metrics = metrics
        self._service = ServiceWeights()
        self._weights: dict[str, float] = {}
        """Weights of the tenants that have called here, by handle."""
        self._known_weight = known_weight
        self._strangers: dict[str, float] = {}
        """Reported weights of handles that this gateway does not know, such as those of tenants that are new."""
        self.fair = FairOrders(lambda: FairOrder(weight_of=self.weight_of, service=self._service))
        self.statistics = ServiceStatistics(lambda model: self.fair.order(model))
        self.learnt = LearntOutputs()
        self._learnt_cached = LearntMeans()
        self._charges: dict[str, _Charge] = {}
        self._gone: dict[tuple[str, str], float] = {}

    def weight_of(self, tenant: str) -> float:
        """Return the weight of a tenant; 1 if the tenant is unknown. `tenant`: the tenant's handle."""
        return self._weights.get(tenant) or self._known_weight(tenant) or self._strangers.get(tenant, 1.0)

    def _accepts(self, rank: int, tenant: str, weight: float) -> bool:
        """Return whether a report of a worker may name a tenant and a rank. The tenants of this gateway are accepted,
        and MAX_STRANGERS others, so that made-up handles fill no memory."""
        if rank > self._last_rank:
            return False
        if tenant in self._weights or self._known_weight(tenant) is not None:
            self._strangers.pop(tenant, None)
            return True
        if tenant not in self._strangers and len(self._strangers) >= MAX_STRANGERS:
            return False
        self._strangers[tenant] = weight
        return True

    def rank_of(self, priority_class: str) -> int:
        """Return the rank of a priority class. Rank 0 is served first."""
        return self._ranks.get(priority_class, self._last_rank)

    def classes_from(self, priority_class: str) -> list[str]:
        """Return a priority class and all classes that are served after it, in the order of service."""
        first = self.rank_of(priority_class)
        return sorted((name for name, rank in self._ranks.items() if rank >= first), key=self.rank_of)

    # ---- one sequence

    def waiting(self, sequence: LinkedSequence[Call]) -> WaitingSequence:
        """Return the waiting room's entry for a sequence. A sequence that was queued before keeps its first entry and
        its charge."""
        if (place := self.place(sequence)) is not None:
            return place
        call, tokens, parsing = sequence.call, len(sequence.request.prompt_token_ids), sequence.request.parsing
        flow = call.policy.flow
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
            output_tokens=0 if call.is_pooling else self._expected_output(flow, sequence),
            needs_tools=parsing is not None and parsing.needs_tools,
            affinity=call.affinity,
            adapter=sequence.request.adapter,
        )
        self._charges[sequence.key] = _Charge(place)
        return place

    def _expected_output(self, flow: str, sequence: LinkedSequence[Call]) -> int:
        return self.learnt.expected(flow, sequence.call.model, sequence.request.sampling.max_tokens)

    def place(self, sequence: LinkedSequence[Call]) -> WaitingSequence | None:
        """Return the waiting room's entry for a sequence; None if the sequence was never queued."""
        charge = self._charges.get(sequence.key)
        return None if charge is None else charge.place

    def began(self, sequence: CallSequence, cached_tokens: int) -> None:
        """Correct the charge of a sequence whose first output has arrived. `cached_tokens`: number of prompt tokens
        that were in the worker's cache."""
        call = sequence.call
        self.fair.order(call.model).cached(sequence.key, cached_tokens)
        self._learnt_cached.observe(call.policy.flow, call.model, cached_tokens)

    def grew(self, sequence: CallSequence) -> WaitingSequence | None:
        """Raise the service charge of a running sequence if its output has become longer than the output that was
        charged. Called a few times a second. If the charge was raised, returns the waiting room's entry for the
        sequence, else None."""
        tokens, charge = len(sequence.emitted), self._charges.get(sequence.key)
        if charge is None or tokens < charge.due or not tokens:
            return None
        self.fair.order(sequence.call.model).generated(sequence.key, tokens)
        charge.due = tokens + GROWTH_TOKENS
        return charge.place

    def settle(self, sequence: CallSequence) -> None:
        """Correct the charge of a sequence that has ended to its actual cost. Idempotent."""
        charge = self._charges.get(sequence.key)
        if charge is None or charge.settled:
            return
        charge.settled = True
        call, tokens = sequence.call, len(sequence.emitted)
        order = self.fair.order(call.model)
        if not sequence.life.computed:
            order.revoked(sequence.key)
            return
        order.generated(sequence.key, tokens)
        order.ended(sequence.key)
        service = self._service.prompt(len(sequence.request.prompt_token_ids), sequence.cached_tokens)
        service += self._service.output * (tokens - sequence.restored)
        self._metrics.count("tenant_service_tokens_total", call.model, call.policy.name, by=service)
        if tokens:
            self.learnt.observe(call.policy.flow, call.model, tokens, cut=sequence.finish_reason == "length")

    def forget(self, sequence: CallSequence) -> None:
        """Forget the charge of a sequence whose call has ended."""
        self._charges.pop(sequence.key, None)

    # ---- reports of workers

    def joined(self, worker: WorkerIdentity) -> None:
        """Record that a worker has connected."""
        self._gone.pop((worker.model, worker.worker_id), None)

    def left(self, worker: WorkerIdentity, now: float) -> None:
        """Record that a worker's link has ended. The worker may reconnect."""
        self.fair.order(worker.model).worker_totals.link_ended(worker.worker_id)
        self._gone[worker.model, worker.worker_id] = now

    def served(
        self,
        worker: WorkerIdentity,
        totals: Sequence[WeightedValue[ServedTotal]],
        now: float,
        *,
        continues: bool = False,
    ) -> None:
        """Apply a worker's report of the service (weighted tokens) that it has given to each tenant, summed over all
        gateways. `continues`: whether `totals` continue the report that was applied last."""
        accepted = [x.value for x in totals if self._accepts(x.value.rank, x.value.tenant, x.weight)]
        self.fair.order(worker.model).worker_totals.apply(
            worker.worker_id, worker.incarnation, accepted, now, continues=continues
        )

    def replace_peer_backlog(
        self, model: str, gateway: str, waiting: Sequence[WeightedValue[FlowBacklog]], now: float
    ) -> None:
        """Replace the known backlog of another gateway for a model."""
        flows = {x.value.flow: x.value.backlog for x in waiting if self._accepts(*x.value.flow, x.weight)}
        self.fair.order(model).backlogs.replace_peer(gateway, flows, now)

    # ---- time

    def sweep(self, models: Mapping[str, bool], now: float) -> None:
        """Update `statistics`, and forget workers whose links ended at least GONE_S ago. Called once a second.
        `models`: for each model, whether a worker is linked."""
        for (model, worker), when in list(self._gone.items()):
            if now - when >= GONE_S:
                del self._gone[model, worker]
                self.fair.order(model).worker_totals.forget(worker)
        self.fair.sweep(now)
        self.fair.retain_models(models)
        self.statistics.update(models)

    def __repr__(self) -> str:
        return f"ServiceCharges({self.fair}, {len(self._weights)} tenants)"
