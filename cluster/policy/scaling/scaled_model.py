"""One model as the scaler sees it: the decided number of replicas, the learnt rates, and the reasons of decisions.

A model may have several types of GPU, each with its own spec. Rates are learnt for each type, and the number of
replicas is decided for each type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from cluster.api.scaling import ModelScaling, ScalingDecision, ScalingExplanation
from cluster.api.types import CatalogEntry, ModelSpec
from cluster.policy.catalog.placement import world_size
from cluster.policy.catalog.versions import over_types
from cluster.policy.scaling.decision_log import DecisionLog, action_of
from cluster.policy.scaling.inputs import ModelInputs, OperatorRequest, RayReplicas
from cluster.policy.scaling.learnt_rates import LearntRates
from cluster.policy.scaling.portfolio import ClassDemand, ModelSeen, ModelSettings, ReplicaDecision, ReplicaSeen, Slo
from cluster.policy.scaling.replica_states import ReplicaStates

PLENTY = 1_000_000
"""Assumed number of replicas that fit on a type of GPU whose capacity is unknown."""


class ScaledModel:
    """Scaling state of one model. In each pass, call `observe`. Then call `apply` if the policy has decided, or
    `hold` if the demand is unknown.

    `now` is monotonic, in seconds; `wall_s` is the same time in seconds since the epoch. `requests` holds the
    operators' requests for the model. If an operator or the configuration freezes all models, the caller must set
    `requests.all_frozen`.
    """

    def __init__(self, inputs: ModelInputs, cold_start_s: float) -> None:
        """`cold_start_s`: assumed cold-start time until one is learnt."""
        self._inputs = inputs
        self._assumed_cold_start_s = cold_start_s
        self._desired: dict[str, int] | None = None
        """Decided number of replicas by GPU type; None before the first pass."""
        self._states = ReplicaStates()
        self._rates = LearntRates()
        self._log = DecisionLog()
        self._numbers: Mapping[str, float] = {}
        """Numbers of the policy's newest decision."""
        self._gpu_seconds = 0.0
        self._scaling = ModelScaling(self._spec.name)

    def __repr__(self) -> str:
        return f"ScaledModel({self._spec.name} {self.total})"

    # ---- a pass

    def observe(
        self,
        inputs: ModelInputs,
        demand: Mapping[str, ClassDemand],
        requests: OperatorRequest,
        passed_s: float,
        now: float,
        wall_s: float,
    ) -> ModelSeen:
        """Return the observation of the model for the policy. `passed_s`: seconds since the previous pass."""
        self._inputs = inputs
        self._desired = self._first_desired()
        self._rates.observe(inputs.workers)
        replicas = self._states.observe(inputs, self._desired, now, wall_s)
        for spec in inputs.types:
            ray = inputs.rays.get(spec.gpu, RayReplicas())
            held = max(ray.running + ray.placed + ray.leaving, len(inputs.workers[spec.gpu]))
            self._gpu_seconds += passed_s * held * world_size(spec)
        self._scaling = self._scaling_of(replicas, requests)
        return ModelSeen(
            settings=self._settings(requests),
            demand=demand,
            replicas=replicas,
            rates={spec.gpu: self._rates.rates(spec) for spec in inputs.types},
            room=inputs.room,
        )

    def apply(self, decision: ReplicaDecision, requests: OperatorRequest, now: float, wall_s: float) -> ScalingDecision:
        """Apply a decision of the scaling policy, and return the decision as it was applied. If `requests` freezes the
        model, its numbers of replicas stay the same."""
        last = self._desired or {}
        desired = last
        if not requests.is_frozen(decision.model):
            desired = {gpu: decision.replicas.get(gpu, 0) for gpu in last}
        changes = [count - last[gpu] for gpu, count in desired.items()]
        self._desired = desired
        self._states.record_change(changes, now)
        self._numbers = dict(decision.numbers)
        before, wanted = self._scaling.desired, self.total
        action = action_of(before, wanted) if wanted != before or not any(changes) else "move"
        made = ScalingDecision(wall_s, before, wanted, action, decision.why, dict(decision.numbers))
        self._scaling = dataclasses.replace(self._scaling, desired=wanted, why=decision.why)
        self._log.add(made)
        return made

    def hold(self, requests: OperatorRequest, wall_s: float) -> ScalingDecision | None:
        """Keep the number of replicas while the demand is unknown. Only the model's bounds and operators' requests can
        change it.

        Returns the change, or None.
        """
        spec, before, decision = self._spec, self._scaling.desired, None
        within = min(max(before, spec.min_replicas), max(spec.max_replicas, spec.min_replicas))
        wanted = before if requests.is_frozen(spec.name) else requests.manual.get(spec.name, within)
        if wanted != before:
            self._desired = _spread(self._inputs, wanted, self._desired or {})
            why = "manual" if spec.name in requests.manual else "bounds"
            decision = ScalingDecision(wall_s, before, wanted, action_of(before, wanted), why)
            self._log.add_uncounted(decision)
        self._scaling = dataclasses.replace(self._scaling, desired=wanted, why="no gateway is linked")
        return decision

    @property
    def _spec(self) -> ModelSpec:
        """Spec of the preferred type of GPU."""
        return self._inputs.types[0]

    def _first_desired(self) -> dict[str, int]:
        """Return the number of replicas at the beginning of a pass, for each current type of GPU.

        The numbers are those of the last decision. Without a decision they are the targets on Ray; for a new model,
        they are the initial number in the catalog entry.
        """
        types, rays, last = self._inputs.types, self._inputs.rays, self._desired
        if last is None and rays:
            last = {gpu: ray.target for gpu, ray in rays.items()}
        gpus = [spec.gpu for spec in types]
        if last is not None and set(last) <= set(gpus):
            return {gpu: last.get(gpu, 0) for gpu in gpus}
        return _spread(self._inputs, types[0].replicas if last is None else sum(last.values()), last or {})

    def _settings(self, requests: OperatorRequest) -> ModelSettings:
        spec = self._spec
        return ModelSettings(
            min_replicas=spec.min_replicas,
            max_replicas=max(spec.max_replicas, spec.min_replicas),
            idle_s=spec.idle_s,
            slo=Slo(spec.slo_ttft_s, spec.slo_itl_s, spec.slo_target),
            gpus=tuple(of_type.gpu for of_type in self._inputs.types),
            cold_start_s=self._states.cold_start_s or self._assumed_cold_start_s,
            manual=requests.manual.get(spec.name),
            frozen=spec.name in requests.frozen,
        )

    def _scaling_of(self, replicas: list[ReplicaSeen], requests: OperatorRequest) -> ModelScaling:
        spec = self._spec
        return ModelScaling(
            name=spec.name,
            target=sum(ray.target for ray in self._inputs.rays.values()),
            running=sum(replica.state == "ready" for replica in replicas),
            starting=sum(replica.state == "starting" for replica in replicas),
            desired=self.total,
            min_replicas=spec.min_replicas,
            max_replicas=max(spec.max_replicas, spec.min_replicas),
            idle_s=spec.idle_s,
            by=requests.decided_by(spec.name),
            why=self._log.why,
            cold_start_s=self._states.cold_start_s,
        )

    # ---- reading

    @property
    def total(self) -> int:
        """Decided number of replicas on all types of GPU; 0 before the first pass."""
        return sum((self._desired or {}).values())

    @property
    def scaling(self) -> ModelScaling:
        """Current scaling state."""
        return self._scaling

    def replicas(self, spec: ModelSpec) -> int:
        """Return the number of replicas that the model should have on the type of GPU in `spec`."""
        return spec.replicas if self._desired is None else self._desired.get(spec.gpu, 0)

    def with_scaling_fields(self, entry: CatalogEntry) -> CatalogEntry:
        """Return the model's catalog entry with its scaling fields set."""
        return dataclasses.replace(
            entry,
            replicas_desired=sum(self.replicas(of_type) for of_type in self._inputs.types),
            cold_start_s=round(self._states.cold_start_s, 1) or entry.cold_start_s or self._assumed_cold_start_s,
            starting_since_s=self._states.starting_since_s,
        )

    def explain(self, limit: int = 0) -> ScalingExplanation:
        """Return the scaling state and up to `limit` of the newest decisions. With `limit` 0, all kept decisions are
        returned."""
        return ScalingExplanation(self._scaling, self._log.newest(limit), {**self._numbers, **self._rates.numbers()})

    def counters(self) -> tuple[Mapping[str, int], float]:
        """Return the number of decisions of each action, and the GPU-seconds used, since this object was created."""
        return self._log.counts, self._gpu_seconds


def _spread(inputs: ModelInputs, replicas: int, there: Mapping[str, int]) -> dict[str, int]:
    """Divide replicas over the types of GPU. Existing replicas (`there`) stay on their type where possible."""
    gpus = [spec.gpu for spec in inputs.types]
    room = [inputs.room.get(gpu, PLENTY) for gpu in gpus]
    counts = over_types(replicas, room, [there.get(gpu, 0) for gpu in gpus])
    return dict(zip(gpus, counts, strict=True))
