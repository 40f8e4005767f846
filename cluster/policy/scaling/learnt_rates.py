"""Learnt throughput of one model's replicas on each type of GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.api.types import ModelSpec
from cluster.policy.catalog.placement import world_size
from cluster.policy.scaling.inputs import WorkerSeen
from cluster.policy.scaling.portfolio import Rates
from cluster.policy.scaling.replica_rates import LearntCosts, ReplicaLimits


@dataclass(slots=True)
class _Learnt:
    """Learnt values of one model's replicas on one type of GPU: the costs of a step, and the newest batch limits."""

    costs: LearntCosts = field(default_factory=LearntCosts)
    limits: ReplicaLimits = field(default_factory=lambda: ReplicaLimits(0, 0, 0))


class LearntRates:
    """Learnt throughput (rates) of the replicas of one model. Call `observe` once per pass."""

    def __init__(self) -> None:
        self._by_gpu: dict[str, _Learnt] = {}

    def __repr__(self) -> str:
        return f"LearntRates({', '.join(self._by_gpu) or 'nothing seen'})"

    def observe(self, workers: Mapping[str, Sequence[WorkerSeen]]) -> None:
        """Add the reports of all workers of the model. The keys of `workers` are types of GPU; a type without a key is
        forgotten."""
        self._by_gpu = {gpu: self._by_gpu.get(gpu) or _Learnt() for gpu in workers}
        for gpu, learnt in self._by_gpu.items():
            learnt.costs.observe({worker.incarnation: worker.work for worker in workers[gpu]})
            for worker in workers[gpu]:
                if worker.limits is not None:
                    learnt.limits = worker.limits

    def rates(self, spec: ModelSpec) -> Rates:
        """Return the rates of a replica on the type of GPU in `spec`. The last call of `observe` must have included
        this type."""
        learnt = self._by_gpu[spec.gpu]
        return learnt.costs.rates(learnt.limits, spec.slo_itl_s, world_size(spec))

    def numbers(self) -> dict[str, float]:
        """Return the learnt costs, with the names that an explanation of scaling shows."""
        numbers: dict[str, float] = {}
        for gpu, learnt in self._by_gpu.items():
            costs = learnt.costs.costs()
            if costs is not None:
                of = f"[{gpu}]" if len(self._by_gpu) > 1 else ""
                numbers |= {
                    f"learnt_step_s{of}": costs.fixed_s,
                    f"learnt_decode_s_a_token{of}": costs.decode_s,
                    f"learnt_prefill_s_a_token{of}": costs.prefill_s,
                }
        return numbers
