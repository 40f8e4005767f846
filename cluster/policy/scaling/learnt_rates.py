"""Learnt rates of one model on each of its types of GPU."""

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
    """Learnt costs and newest limits of replicas on one type of GPU."""

    costs: LearntCosts = field(default_factory=LearntCosts)
    limits: ReplicaLimits = field(default_factory=lambda: ReplicaLimits(0, 0, 0))


class LearntRates:
    """Learnt rates of one model. Call `observe` once per pass."""

    def __init__(self) -> None:
        self._by_gpu: dict[str, _Learnt] = {}

    def __repr__(self) -> str:
        return f"LearntRates({', '.join(self._by_gpu) or 'nothing seen'})"

    def observe(self, workers: Mapping[str, Sequence[WorkerSeen]]) -> None:
        """Add the reports of all workers of the model, by type of GPU. A type that is no longer listed is forgotten."""
        self._by_gpu = {gpu: self._by_gpu.get(gpu) or _Learnt() for gpu in workers}
        for gpu, learnt in self._by_gpu.items():
            learnt.costs.observe({worker.incarnation: worker.work for worker in workers[gpu]})
            for worker in workers[gpu]:
                if worker.limits is not None:
                    learnt.limits = worker.limits

    def rates(self, spec: ModelSpec) -> Rates:
        """Return the rates of a replica on the type of GPU in `spec`, which was listed in the last pass."""
        learnt = self._by_gpu[spec.gpu]
        return learnt.costs.rates(learnt.limits, spec.slo_itl_s, world_size(spec))

    def numbers(self) -> dict[str, float]:
        """Return the learnt costs. The keys are the names under which an explanation shows the costs."""
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
