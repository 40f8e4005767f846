"""Scaling of all models, from observations of the cluster to the number of replicas of each model. Pure.

The policy (`portfolio`) decides. This module assembles the observations for the policy and keeps the data that explains
the decisions. Only the requests of operators (`OperatorRequest`) have to be stored. After a restart, a new scaler takes
the targets on Ray as the last decisions, learns rates and cold starts again, and counts demand as the growth of the
gateways' counters from now on.

While no gateway is connected, the demand is unknown, and all numbers of replicas stay the same.

A model may have several types of GPU, each with its own spec. Rates are learnt, and numbers of replicas are decided,
for each type.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.api.demand import ComputedWork
from cluster.api.scaling import ModelScaling, ScalingDecision, ScalingExplanation
from cluster.api.types import CatalogEntry, ModelSpec
from cluster.policy.catalog.versions import over_types
from cluster.policy.scaling.demand import DemandTotals
from cluster.policy.scaling.portfolio import (
    Memory,
    ModelSeen,
    ModelSettings,
    Observation,
    Rates,
    ReplicaDecision,
    ReplicaSeen,
    Slo,
    decide,
)
from cluster.policy.scaling.portfolio.types import ReplicaState
from cluster.policy.scaling.replica_rates import LearntCosts, ReplicaLimits

Kind = tuple[str, str]
"""A model and a type of GPU."""
PLENTY = 1_000_000
"""Assumed number of replicas that fit on a type of GPU whose capacity is unknown."""
KEPT = 200
"""Number of decisions that are kept for each model, for explanations."""
DECIDE_S = 5.0
"""Interval of decisions in seconds. A held call, an operator's request or a changed entry causes an earlier
decision."""
NEWEST = 0.3
"""Weight of a new cold-start time in the learnt mean; the earlier mean has the weight 1 - NEWEST."""


@dataclass(frozen=True, slots=True)
class ScalingSettings:
    """Values of the `scaling` section of the configuration."""

    gpu_budget: Mapping[str, int] = field(default_factory=dict)
    cold_start_s: float = 60.0
    frozen: bool = False


@dataclass(frozen=True, slots=True)
class OperatorRequest:
    """Scaling requests of operators.

    `manual`: number of replicas by model. `frozen`: names of frozen models. `all_frozen`: every model is frozen,
    including models that are added later.
    """

    manual: Mapping[str, int] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    all_frozen: bool = False


@dataclass(frozen=True, slots=True)
class RayReplicas:
    """Replicas of a model on one type of GPU, as Ray reports them.

    `target`: number that Ray was asked for. `running`, `placed` and `leaving`: numbers of replicas that serve, start
    and stop.
    """

    target: int = 0
    running: int = 0
    placed: int = 0
    leaving: int = 0

    def __add__(self, other: RayReplicas) -> RayReplicas:
        return RayReplicas(
            self.target + other.target,
            self.running + other.running,
            self.placed + other.placed,
            self.leaving + other.leaving,
        )


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    """Worker that is connected to at least one gateway.

    `serves`: whether the worker accepts new calls. `gpu`: type of GPU that the worker was made for; a type that the
    model does not have counts as the model's first type.
    """

    worker_id: str
    incarnation: str
    model: str
    serves: bool = True
    running: int = 0
    kv_use: float = 0.0
    work: ComputedWork = field(default_factory=ComputedWork)
    limits: ReplicaLimits | None = None
    gpu: str = ""


@dataclass(slots=True)
class _Learnt:
    """Learnt costs and limits of a model on one type of GPU."""

    costs: LearntCosts = field(default_factory=LearntCosts)
    limits: ReplicaLimits = field(default_factory=lambda: ReplicaLimits(0, 0, 0))


@dataclass(slots=True)
class _Model:
    desired: dict[str, int] | None = None
    """Decided number of replicas by GPU type; None before the first pass."""
    since: dict[str, tuple[ReplicaState, float]] = field(default_factory=dict)
    ordered_at: list[float] = field(default_factory=list)
    starting_since_s: float = 0.0
    cold_start_s: float = 0.0
    learnt: dict[str, _Learnt] = field(default_factory=dict)
    decisions: deque[ScalingDecision] = field(default_factory=lambda: deque(maxlen=KEPT))
    counts: dict[str, int] = field(default_factory=dict)
    gpu_seconds: float = 0.0
    standing: ModelScaling | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)


class Scaler:
    """Scaler of all models. The controller calls `run_pass` in each pass; a decision follows every `decide_s` seconds.

    After `decide_next_pass` the next pass decides at once. `replicas` returns the decided number. Times
    are of one monotonic clock in seconds; `wall_s` is in seconds since the epoch.
    """

    def __init__(
        self,
        settings: ScalingSettings | None = None,
        now: float = 0.0,
        asked: OperatorRequest | None = None,
        decide_s: float = DECIDE_S,
    ) -> None:
        self.settings = settings or ScalingSettings()
        self.operator_requests = asked or OperatorRequest()
        self.demands = DemandTotals(now)
        self._memory = Memory()
        self._models: dict[str, _Model] = {}
        self._specs: dict[str, tuple[ModelSpec, ...]] = {}
        self._room: Mapping[Kind, int] = {}
        self._looked_at: float | None = None
        self._decide_s = decide_s
        self._decide_at = now

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {_total(model.desired or {})}" for name, model in self._models.items())
        return f"Scaler({counts or 'nothing seen'})"

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

        Several `specs` with one name describe one model on several types of GPU, the preferred type first. `blind`: no
        gateway is connected. `room`: number of replicas that fit, by model and type of GPU; a type without an entry has
        enough capacity.
        """
        passed_s = 0.0 if self._looked_at is None else now - self._looked_at
        self._looked_at = now
        wanted: dict[str, tuple[ModelSpec, ...]] = {}
        for spec in specs:
            wanted[spec.name] = (*wanted.get(spec.name, ()), spec)
        if wanted != self._specs:
            self.decide_next_pass()
        self._specs, self._room = wanted, room or {}
        self._models = {name: self._models.get(name) or _Model() for name in self._specs}
        mine: dict[str, dict[str, list[WorkerSeen]]] = {
            name: {spec.gpu: [] for spec in types} for name, types in self._specs.items()
        }
        for worker in workers:
            if worker.model in mine:
                of_model = mine[worker.model]
                of_model.get(worker.gpu, next(iter(of_model.values()))).append(worker)
        seen: dict[str, ModelSeen] = {}
        decides = not blind and now >= self._decide_at
        demand = self.demands.pop_demand(now) if decides else {}
        for name, types in self._specs.items():
            rays = _by_type(types, on_ray)
            model = self._models[name]
            model.desired = self._begun(model, types, rays)
            self._learn(model, mine[name])
            replicas = self._replicas(types, model, rays, mine[name], now, wall_s)
            for spec in types:
                ray = rays.get(spec.gpu, RayReplicas())
                held = max(ray.running + ray.placed + ray.leaving, len(mine[name][spec.gpu]))
                model.gpu_seconds += passed_s * held * world_size(spec)
            model.standing = self._standing(types[0], model, sum(ray.target for ray in rays.values()), replicas)
            seen[name] = ModelSeen(
                settings=self._settings_of(types, model),
                demand=demand.get(name, {}),
                replicas=replicas,
                rates={spec.gpu: _rates(model, spec) for spec in types},
                room={spec.gpu: self._room[name, spec.gpu] for spec in types if (name, spec.gpu) in self._room},
            )
        if blind:
            self.decide_next_pass()  # decide as soon as a gateway reports
            return self._hold(wall_s)
        if not decides:
            return ()
        self._decide_at = now + self._decide_s
        observation = Observation(
            models=seen,
            gpu_budget=self.settings.gpu_budget,
            ranks=dict(self.demands.ranks),
            frozen=self.settings.frozen or self.operator_requests.all_frozen,
        )
        decisions, self._memory = decide(observation, self._memory, now)
        return [made for decision in decisions if (made := self._keep(decision, now, wall_s)) is not None]

    def decide_next_pass(self) -> None:
        """Make the next pass decide, even before the interval of decisions is over."""
        self._decide_at = float("-inf")

    def replicas(self, spec: ModelSpec) -> int:
        """Number of replicas that the model should have on the type of GPU in `spec`.

        Before the first pass this is the initial number in the entry.
        """
        model = self._models.get(spec.name)
        return spec.replicas if model is None or model.desired is None else model.desired.get(spec.gpu, 0)

    def with_scaling_fields(self, entry: CatalogEntry) -> CatalogEntry:
        """Return the catalog entry with the scaling fields.

        Gateways need these fields to judge calls by the SLO and to estimate waiting times.
        """
        model, types = self._models.get(entry.name), self._specs.get(entry.name)
        if model is None or types is None:
            return entry
        spec = types[0]
        return dataclasses.replace(
            entry,
            replicas_desired=sum(self.replicas(of_type) for of_type in types),
            cold_start_s=round(model.cold_start_s, 1) or entry.cold_start_s or self.settings.cold_start_s,
            slo_ttft_s=spec.slo_ttft_s,
            slo_itl_s=spec.slo_itl_s,
            slo_target=spec.slo_target,
            starting_since_s=model.starting_since_s,
        )

    # ---- parts of a pass

    def _begun(self, model: _Model, types: Sequence[ModelSpec], rays: Mapping[str, RayReplicas]) -> dict[str, int]:
        """Return the number of replicas to begin the pass with, for each current type of GPU.

        This is the last decision, or else the target on Ray, or else (a new model) the initial number in the entry.
        """
        last = model.desired
        if last is None and rays:
            last = {gpu: ray.target for gpu, ray in rays.items()}
        gpus = [spec.gpu for spec in types]
        if last is not None and set(last) <= set(gpus):
            return {gpu: last.get(gpu, 0) for gpu in gpus}
        return self._spread(types, types[0].replicas if last is None else _total(last), last or {})

    def _spread(self, types: Sequence[ModelSpec], replicas: int, there: Mapping[str, int]) -> dict[str, int]:
        """Spread replicas over the types of GPU. Existing replicas (`there`) stay on their type where possible."""
        room = [self._room.get((spec.name, spec.gpu), PLENTY) for spec in types]
        counts = over_types(replicas, room, [there.get(spec.gpu, 0) for spec in types])
        return {spec.gpu: count for spec, count in zip(types, counts, strict=True)}

    def _settings_of(self, types: Sequence[ModelSpec], model: _Model) -> ModelSettings:
        spec = types[0]
        return ModelSettings(
            min_replicas=spec.min_replicas,
            max_replicas=max(spec.max_replicas, spec.min_replicas),
            idle_s=spec.idle_s,
            slo=Slo(spec.slo_ttft_s, spec.slo_itl_s, spec.slo_target),
            gpus=tuple(of_type.gpu for of_type in types),
            cold_start_s=model.cold_start_s or self.settings.cold_start_s,
            manual=self.operator_requests.manual.get(spec.name),
            frozen=spec.name in self.operator_requests.frozen,
        )

    def _learn(self, model: _Model, workers: Mapping[str, Sequence[WorkerSeen]]) -> None:
        model.learnt = {gpu: model.learnt.get(gpu) or _Learnt() for gpu in workers}
        for gpu, learnt in model.learnt.items():
            learnt.costs.observe({worker.incarnation: worker.work for worker in workers[gpu]})
            for worker in workers[gpu]:
                if worker.limits is not None:
                    learnt.limits = worker.limits

    def _replicas(
        self,
        types: Sequence[ModelSpec],
        model: _Model,
        rays: Mapping[str, RayReplicas],
        workers: Mapping[str, Sequence[WorkerSeen]],
        now: float,
        wall_s: float,
    ) -> list[ReplicaSeen]:
        """Return the states of all replicas of a model.

        Connected replicas are ready. Replicas that are missing to reach the target are starting. Replicas beyond the
        target are draining.
        """
        states: dict[str, ReplicaState] = {}
        gpus: dict[str, str] = {}
        for spec in types:
            mine = self._states(spec, model, rays.get(spec.gpu, RayReplicas()), workers[spec.gpu], now)
            states |= mine
            gpus |= dict.fromkeys(mine, spec.gpu)
        started = [name for name, state in states.items() if state == "ready" and name not in model.since]
        self._started(model, started, now)
        model.since = {
            name: before if (before := model.since.get(name)) is not None and before[0] == state else (state, now)
            for name, state in states.items()
        }
        serving = any(worker.serves for of_type in workers.values() for worker in of_type)
        if serving or "starting" not in states.values():
            model.starting_since_s = 0.0
        elif not model.starting_since_s:
            model.starting_since_s = wall_s - (now - min(model.ordered_at, default=now))
        linked = {worker.worker_id: worker for of_type in workers.values() for worker in of_type}
        return [
            ReplicaSeen(
                replica_id=name,
                state=state,
                since_s=model.since[name][1],
                gpu=gpus[name],
                running=linked[name].running if name in linked else 0,
                kv_use=linked[name].kv_use if name in linked else 0.0,
            )
            for name, state in states.items()
        ]

    def _states(
        self, spec: ModelSpec, model: _Model, ray: RayReplicas, workers: Sequence[WorkerSeen], now: float
    ) -> dict[str, ReplicaState]:
        """States of the replicas on one type of GPU, by the name of the replica."""
        target = (model.desired or {}).get(spec.gpu, 0)
        serving = sorted((w for w in workers if w.serves), key=lambda w: model.since.get(w.worker_id, ("", now))[1])
        states: dict[str, ReplicaState] = {w.worker_id: "ready" for w in serving[:target]}
        states |= {w.worker_id: "draining" for w in workers if w.worker_id not in states}
        kind = f"{spec.name}-{spec.gpu}" if spec.gpu else spec.name
        states |= {f"{kind}-starting-{number}": "starting" for number in range(target - len(serving[:target]))}
        unlinked = max(ray.leaving - sum(state == "draining" for state in states.values()), 0)
        return states | {f"{kind}-leaving-{number}": "draining" for number in range(unlinked)}

    def _started(self, model: _Model, names: Sequence[str], now: float) -> None:
        """Learn the cold-start time from the replicas `names`, which serve for the first time.

        Each replica is matched with the oldest open start that this scaler has decided. A replica without such a start
        is not counted.
        """
        for _ in names:
            if not model.ordered_at:
                return
            took_s = now - model.ordered_at.pop(0)
            model.cold_start_s += (took_s - model.cold_start_s) * (NEWEST if model.cold_start_s else 1.0)

    def _standing(self, spec: ModelSpec, model: _Model, target: int, replicas: Sequence[ReplicaSeen]) -> ModelScaling:
        frozen = self.settings.frozen or self.operator_requests.all_frozen or spec.name in self.operator_requests.frozen
        return ModelScaling(
            name=spec.name,
            target=target,
            running=sum(replica.state == "ready" for replica in replicas),
            starting=sum(replica.state == "starting" for replica in replicas),
            desired=_total(model.desired or {}),
            min_replicas=spec.min_replicas,
            max_replicas=max(spec.max_replicas, spec.min_replicas),
            idle_s=spec.idle_s,
            by="frozen" if frozen else "manual" if spec.name in self.operator_requests.manual else "demand",
            why=model.decisions[-1].why if model.decisions else "",
            cold_start_s=model.cold_start_s,
        )

    def _keep(self, decision: ReplicaDecision, now: float, wall_s: float) -> tuple[str, ScalingDecision] | None:
        """Apply a decision on replicas. Returns the model and its scaling decision, or None if nothing changes."""
        name, model = decision.model, self._models[decision.model]
        assert model.standing is not None, "it has been looked at"
        assert model.desired is not None, "it has been looked at"
        last_time = model.desired
        if not self._frozen(name):
            model.desired = {gpu: decision.replicas.get(gpu, 0) for gpu in last_time}
        more = {gpu: count - last_time[gpu] for gpu, count in model.desired.items()}
        fewer = -sum(min(count, 0) for count in more.values())
        del model.ordered_at[max(len(model.ordered_at) - fewer, 0) :]
        model.ordered_at += [now] * sum(max(count, 0) for count in more.values())
        model.numbers = dict(decision.numbers)
        before, wanted = model.standing.desired, _total(model.desired)
        action = _action(before, wanted) if wanted != before or not any(more.values()) else "move"
        made = ScalingDecision(wall_s, before, wanted, action, decision.why, dict(decision.numbers))
        model.standing = dataclasses.replace(model.standing, desired=wanted, why=decision.why)
        model.counts[action] = model.counts.get(action, 0) + 1
        last = model.decisions[-1] if model.decisions else None
        if action == "hold" and last is not None and (last.action, last.why) == ("hold", decision.why):
            model.decisions[-1] = dataclasses.replace(last, numbers=made.numbers, passes=last.passes + 1)
            return None
        model.decisions.append(made)
        return None if action == "hold" else (name, made)

    def _hold(self, wall_s: float) -> Sequence[tuple[str, ScalingDecision]]:
        """Keep the numbers of replicas while the demand is unknown; only bounds and operators' requests change them.

        Returns the changes, each with the name of the model.
        """
        made = []
        for name, model in self._models.items():
            assert model.standing is not None, "it has been looked at"
            types, before = self._specs[name], model.standing.desired
            spec = types[0]
            within = min(max(before, spec.min_replicas), max(spec.max_replicas, spec.min_replicas))
            wanted = before if self._frozen(name) else self.operator_requests.manual.get(name, within)
            if wanted != before:
                model.desired = self._spread(types, wanted, model.desired or {})
                why = "manual" if name in self.operator_requests.manual else "bounds"
                decision = ScalingDecision(wall_s, before, wanted, _action(before, wanted), why)
                model.decisions.append(decision)
                made.append((name, decision))
            model.standing = dataclasses.replace(model.standing, desired=wanted, why="no gateway is linked")
        return made

    def _frozen(self, name: str) -> bool:
        return self.settings.frozen or self.operator_requests.all_frozen or name in self.operator_requests.frozen

    # ---- reading

    def standing(self, name: str) -> ModelScaling:
        """Current scaling state of a model. Raises KeyError for an unknown model."""
        standing = self._models[name].standing
        return standing if standing is not None else ModelScaling(name)

    def explain(self, name: str, limit: int = 0) -> ScalingExplanation:
        """Current scaling state of a model and its last decisions, the newest last. Raises KeyError for an unknown
        model."""
        model = self._models[name]
        return ScalingExplanation(
            self.standing(name), list(model.decisions)[-limit if limit else 0 :], self._numbers(model)
        )

    def _numbers(self, model: _Model) -> Mapping[str, float]:
        numbers = dict(model.numbers)
        for gpu, learnt in model.learnt.items():
            costs = learnt.costs.costs()
            if costs is not None:
                of = f"[{gpu}]" if len(model.learnt) > 1 else ""
                numbers |= {
                    f"learnt_step_s{of}": costs.fixed_s,
                    f"learnt_decode_s_a_token{of}": costs.decode_s,
                    f"learnt_prefill_s_a_token{of}": costs.prefill_s,
                }
        return numbers

    def counters(self) -> Mapping[str, tuple[Mapping[str, int], float]]:
        """Return by model the number of decisions by action, and the GPU-seconds held. Both count since creation."""
        return {name: (dict(model.counts), model.gpu_seconds) for name, model in self._models.items()}

    @property
    def names(self) -> Sequence[str]:
        """Names of the models that should run."""
        return list(self._models)

    def find(self, name: str) -> ModelSpec | None:
        """Find a model by name or alias. Returns the spec of the first type of GPU of the model, or None."""
        if name in self._specs:
            return self._specs[name][0]
        return next((types[0] for types in self._specs.values() if name in types[0].aliases), None)


def world_size(spec: ModelSpec) -> int:
    """Number of GPUs of one replica."""
    return spec.tensor_parallel_size * spec.pipeline_parallel_size


def _total(counts: Mapping[str, int]) -> int:
    return sum(counts.values())


def _by_type(types: Sequence[ModelSpec], on_ray: Mapping[Kind, RayReplicas]) -> dict[str, RayReplicas]:
    """Replicas of a model on Ray, by type of GPU.

    A type that the model does not have counts as the first type of the model.
    """
    gpus = [spec.gpu for spec in types]
    by_gpu: dict[str, RayReplicas] = {}
    for (name, gpu), ray in on_ray.items():
        if name == types[0].name:
            gpu = gpu if gpu in gpus else gpus[0]
            by_gpu[gpu] = by_gpu.get(gpu, RayReplicas()) + ray
    return by_gpu


def _rates(model: _Model, spec: ModelSpec) -> Rates:
    learnt = model.learnt[spec.gpu]
    return learnt.costs.rates(learnt.limits, spec.slo_itl_s, world_size(spec))


def _action(before: int, wanted: int) -> str:
    if wanted == before:
        return "hold"
    if wanted > before:
        return "up" if before else "from_zero"
    return "down" if wanted else "to_zero"
