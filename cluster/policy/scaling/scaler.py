"""Scaling of all models, from observations of the cluster to the number of replicas of each model. Pure.

The policy (`portfolio`) decides. Each ScaledModel assembles the observation of one model for the policy, and keeps the
data that explains the decisions. Only the requests of operators (`OperatorRequest`) have to be stored. After a restart,
a new scaler takes the targets on Ray as the last decisions, learns rates and cold starts again, and counts demand as
the growth of the gateways' counters since the restart.

While no gateway is connected, the demand is unknown, and all numbers of replicas stay the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from cluster.api.scaling import ModelScaling, ScalingDecision, ScalingExplanation
from cluster.api.types import CatalogEntry, ModelSpec
from cluster.policy.scaling.demand import DemandTotals
from cluster.policy.scaling.inputs import (
    Kind,
    OperatorRequest,
    RayReplicas,
    ScalingSettings,
    WorkerSeen,
    inputs_by_model,
)
from cluster.policy.scaling.portfolio import Memory, ModelSeen, Observation, decide
from cluster.policy.scaling.scaled_model import ScaledModel

DECIDE_S = 5.0
"""Interval of decisions in seconds. A call that waits because no replica is ready, an operator's request or a changed
catalog entry causes an earlier decision."""


class Scaler:
    """Scaler of all models. The controller calls `run_pass` in each pass, and a pass decides if `decide_s` seconds have
    passed since the last decision.

    After `decide_next_pass` the next pass decides at once. Times are monotonic seconds; `wall_s` is in seconds since
    the epoch.
    """

    def __init__(
        self,
        settings: ScalingSettings | None = None,
        now: float = 0.0,
        asked: OperatorRequest | None = None,
        decide_s: float = DECIDE_S,
    ) -> None:
        """`asked`: stored requests of operators."""
        self.settings = settings or ScalingSettings()
        self.demands = DemandTotals(now)
        self._operator_requests = asked or OperatorRequest()
        self._memory = Memory()
        self._models: dict[str, ScaledModel] = {}
        self._types: dict[str, tuple[ModelSpec, ...]] = {}
        """Specs by model, one for each type of GPU."""
        self._passed_at: float | None = None
        self._decide_s = decide_s
        self._decide_at = now

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {model.total}" for name, model in self._models.items())
        return f"Scaler({counts or 'nothing seen'})"

    # ---- operators

    @property
    def operator_requests(self) -> OperatorRequest:
        """Current requests of operators."""
        return self._operator_requests

    def set_operator_requests(self, requests: OperatorRequest) -> None:
        """Replace the operators' scaling requests. The next pass decides at once and uses the new requests."""
        self._operator_requests = requests
        self.decide_next_pass()

    # ---- a pass

    def run_pass(
        self,
        specs: Sequence[ModelSpec],
        on_ray: Mapping[Kind, RayReplicas],
        workers: Sequence[WorkerSeen],
        now: float,
        wall_s: float,
        *,
        blind: bool = False,
        room: Mapping[Kind, int] | None = None,
    ) -> Sequence[tuple[str, ScalingDecision]]:
        """Run one pass. Returns the new decisions, each with the name of the model.

        Several `specs` with one name describe one model on several types of GPU, the preferred type first. `blind`:
        whether no gateway is connected. `room`: number of replicas that fit, by model and type of GPU; a type without
        an entry has enough capacity.
        """
        passed_s = 0.0 if self._passed_at is None else now - self._passed_at
        self._passed_at = now
        inputs = inputs_by_model(specs, on_ray, workers, room or {})
        types = {name: of_model.types for name, of_model in inputs.items()}
        if types != self._types:
            self.decide_next_pass()
        self._types = types
        self._models = {
            name: self._models.get(name) or ScaledModel(of_model, self.settings.cold_start_s)
            for name, of_model in inputs.items()
        }
        asked = self._operator_requests
        requests = dataclasses.replace(asked, all_frozen=asked.all_frozen or self.settings.frozen)
        decides = not blind and now >= self._decide_at
        demand = self.demands.pop_demand(now) if decides else {}
        seen = {
            name: self._models[name].observe(of_model, demand.get(name, {}), requests, passed_s, now, wall_s)
            for name, of_model in inputs.items()
        }
        if blind:
            self.decide_next_pass()  # decide as soon as a gateway reports
            held = [(name, model.hold(requests, wall_s)) for name, model in self._models.items()]
            return [(name, decision) for name, decision in held if decision is not None]
        return self._decide(seen, requests, now, wall_s) if decides else ()

    def _decide(
        self, seen: Mapping[str, ModelSeen], requests: OperatorRequest, now: float, wall_s: float
    ) -> Sequence[tuple[str, ScalingDecision]]:
        """Let the policy decide, and apply its decisions. Returns the decisions that change something, each with the
        name of the model."""
        self._decide_at = now + self._decide_s
        observation = Observation(
            models=seen,
            gpu_budget=self.settings.gpu_budget,
            ranks=dict(self.demands.ranks),
            frozen=requests.all_frozen,
        )
        decisions, self._memory = decide(observation, self._memory, now)
        made = [(one.model, self._models[one.model].apply(one, requests, now, wall_s)) for one in decisions]
        return [(name, decision) for name, decision in made if decision.action != "hold"]

    def decide_next_pass(self) -> None:
        """Make the next pass decide, even if `decide_s` seconds have not passed yet."""
        self._decide_at = float("-inf")

    # ---- reading

    def replicas(self, spec: ModelSpec) -> int:
        """Return the number of replicas that the model should have on the type of GPU in `spec`.

        Before the first pass this is the initial number in the model's catalog entry.
        """
        model = self._models.get(spec.name)
        return spec.replicas if model is None else model.replicas(spec)

    def with_scaling_fields(self, entry: CatalogEntry) -> CatalogEntry:
        """Return the catalog entry with its scaling fields set.

        Gateways need these fields to judge calls by the SLO and to estimate waiting times.
        """
        model = self._models.get(entry.name)
        return entry if model is None else model.with_scaling_fields(entry)

    def scaling_of(self, name: str) -> ModelScaling:
        """Return the current scaling state of a model. Raises KeyError for an unknown model."""
        return self._models[name].scaling

    def explain(self, name: str, limit: int = 0) -> ScalingExplanation:
        """Return the scaling state of a model and its newest decisions, the newest last. `limit`: maximum number of
        decisions; 0 for all decisions that are kept. Raises KeyError for an unknown model."""
        return self._models[name].explain(limit)

    def counters(self) -> Mapping[str, tuple[Mapping[str, int], float]]:
        """Return, for each model, the number of decisions of each action and the GPU-seconds used. Both are counted
        from the time at which the scaler got the model."""
        return {name: model.counters() for name, model in self._models.items()}

    @property
    def names(self) -> Sequence[str]:
        """Names of the models that should run."""
        return list(self._models)

    def find(self, name: str) -> ModelSpec | None:
        """Find a model by name or alias. Returns its spec for its preferred type of GPU, or None."""
        if name in self._types:
            return self._types[name][0]
        return next((types[0] for types in self._types.values() if name in types[0].aliases), None)
