"""From what is seen of the fleet to the number of replicas that each model is to have. Pure.

The policy (control/scaling) decides; this puts together what it is to see, and keeps what explains it. Nothing that it
keeps has to outlive it but what operators have asked (`Asked`): a new one takes Ray's own targets for what was decided
last, learns rates and cold starts again, and counts demand from where the gateways' counters stand.

While no gateway is linked the demand is not known, and every number stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.api.demand import Work
from cluster.api.scaling import ModelScaling, ScalingDecision, ScalingStory
from cluster.api.types import CatalogEntry, ModelSpec
from cluster.control.demand import Demands
from cluster.control.rates import LearntCosts, Limits
from cluster.control.scaling import (
    Decision,
    Memory,
    ModelSeen,
    ModelSettings,
    Observation,
    ReplicaSeen,
    Slo,
    decide,
)
from cluster.control.scaling.types import ReplicaState

KEPT = 200
"""Decisions of each model that are kept to be explained."""
DECIDE_S = 5.0
"""How often the policy decides, unless something cannot wait: a held call, an operator's word, another entry."""
NEWEST = 0.3
"""What a newer cold start weighs against what is learnt."""


@dataclass(frozen=True, slots=True)
class ScalingSettings:
    """The configuration's `scaling` section."""

    gpu_budget: Mapping[str, int] = field(default_factory=dict)
    cold_start_s: float = 60.0
    frozen: bool = False


@dataclass(frozen=True, slots=True)
class Asked:
    """What operators have asked, by model. `all_frozen`: every model, those that come too."""

    manual: Mapping[str, int] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    all_frozen: bool = False


@dataclass(frozen=True, slots=True)
class OnRay:
    """What Ray has of a model: the number it is told, and replicas that serve, that come up, and that leave."""

    target: int = 0
    running: int = 0
    placed: int = 0
    leaving: int = 0


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    """A worker that some gateway has a link to."""

    worker_id: str
    incarnation: str
    model: str
    serves: bool = True
    running: int = 0
    kv_use: float = 0.0
    work: Work = field(default_factory=Work)
    limits: Limits | None = None


@dataclass(slots=True)
class _Model:
    desired: int | None = None
    since: dict[str, tuple[ReplicaState, float]] = field(default_factory=dict)
    ordered_at: list[float] = field(default_factory=list)
    starting_since_s: float = 0.0
    cold_start_s: float = 0.0
    costs: LearntCosts = field(default_factory=LearntCosts)
    limits: Limits = field(default_factory=lambda: Limits(0, 0, 0))
    decisions: deque[ScalingDecision] = field(default_factory=lambda: deque(maxlen=KEPT))
    counts: dict[str, int] = field(default_factory=dict)
    gpu_seconds: float = 0.0
    standing: ModelScaling | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)


class Scaler:
    """`look` once a pass, which decides now and then; `replicas` then says how many, and `told` adds to a catalog entry
    what gateways are to know.

    Times are of one monotonic clock, `wall_s` since the epoch.
    """

    def __init__(self, settings: ScalingSettings | None = None, now: float = 0.0, asked: Asked | None = None) -> None:
        self.settings = settings or ScalingSettings()
        self.asked = asked or Asked()
        self.demands = Demands(now)
        self._memory = Memory()
        self._models: dict[str, _Model] = {}
        self._specs: dict[str, ModelSpec] = {}
        self._looked_at: float | None = None
        self._decide_at = now

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {one.desired}" for name, one in self._models.items())
        return f"Scaler({counts or 'nothing seen'})"

    # ---- a pass

    def look(
        self,
        specs: Sequence[ModelSpec],
        on_ray: Mapping[str, OnRay],
        workers: Sequence[WorkerSeen],
        now: float,
        wall_s: float,
        *,
        blind: bool = False,
    ) -> Sequence[tuple[str, ScalingDecision]]:
        """What has been decided anew, by model. `blind`: no gateway is linked."""
        passed_s = 0.0 if self._looked_at is None else now - self._looked_at
        self._looked_at = now
        if {spec.name: spec for spec in specs} != self._specs:
            self.hurry()
        self._specs = {spec.name: spec for spec in specs}
        self._models = {name: self._models.get(name) or _Model() for name in self._specs}
        mine: dict[str, list[WorkerSeen]] = {name: [] for name in self._specs}
        for worker in workers:
            if worker.model in mine:
                mine[worker.model].append(worker)
        seen: dict[str, ModelSeen] = {}
        decides = not blind and now >= self._decide_at
        demand = self.demands.take(now) if decides else {}
        for name, spec in self._specs.items():
            ray = on_ray.get(name, OnRay())
            model = self._models[name]
            if model.desired is None:  # what was decided last, by whomever; a model that is new begins
                model.desired = ray.target if name in on_ray else spec.replicas
            self._learn(model, mine[name])
            replicas = self._replicas(spec, model, ray, mine[name], now, wall_s)
            held = max(ray.running + ray.placed + ray.leaving, len(mine[name]))
            model.gpu_seconds += passed_s * held * world_size(spec)
            model.standing = self._standing(spec, model, ray, replicas)
            seen[name] = ModelSeen(
                settings=self._settings_of(spec, model),
                demand=demand.get(name, {}),
                replicas=replicas,
                rates={spec.gpu: model.costs.rates(model.limits, spec.slo_itl_s, world_size(spec))},
            )
        if blind:
            self.hurry()  # as soon as somebody tells
            return self._hold(wall_s)
        if not decides:
            return ()
        self._decide_at = now + DECIDE_S
        observation = Observation(
            models=seen,
            gpu_budget=self.settings.gpu_budget,
            ranks=dict(self.demands.ranks),
            frozen=self.settings.frozen or self.asked.all_frozen,
        )
        decisions, self._memory = decide(observation, self._memory, now)
        return [made for one in decisions if (made := self._keep(one, now, wall_s)) is not None]

    def hurry(self) -> None:
        """Decide at the next look."""
        self._decide_at = float("-inf")

    def replicas(self, spec: ModelSpec) -> int:
        """How many the model is to have; as many as it begins with before the first look."""
        model = self._models.get(spec.name)
        return spec.replicas if model is None or model.desired is None else model.desired

    def told(self, entry: CatalogEntry) -> CatalogEntry:
        """What gateways need in order to judge calls, and to tell those that wait how long it takes."""
        model, spec = self._models.get(entry.name), self._specs.get(entry.name)
        if model is None or spec is None:
            return entry
        return dataclasses.replace(
            entry,
            replicas_desired=self.replicas(spec),
            cold_start_s=round(model.cold_start_s, 1) or entry.cold_start_s or self.settings.cold_start_s,
            slo_ttft_s=spec.slo_ttft_s,
            slo_itl_s=spec.slo_itl_s,
            starting_since_s=model.starting_since_s,
        )

    # ---- what it is made of

    def _settings_of(self, spec: ModelSpec, model: _Model) -> ModelSettings:
        return ModelSettings(
            min_replicas=spec.min_replicas,
            max_replicas=max(spec.max_replicas, spec.min_replicas),
            idle_s=spec.idle_s,
            slo=Slo(spec.slo_ttft_s, spec.slo_itl_s, spec.slo_target),
            gpus=(spec.gpu,),
            cold_start_s=model.cold_start_s or self.settings.cold_start_s,
            manual=self.asked.manual.get(spec.name),
            frozen=spec.name in self.asked.frozen,
        )

    def _learn(self, model: _Model, workers: Sequence[WorkerSeen]) -> None:
        model.costs.seen({worker.incarnation: worker.work for worker in workers})
        for worker in workers:
            if worker.limits is not None:
                model.limits = worker.limits

    def _replicas(
        self,
        spec: ModelSpec,
        model: _Model,
        ray: OnRay,
        workers: Sequence[WorkerSeen],
        now: float,
        wall_s: float,
    ) -> list[ReplicaSeen]:
        """Linked ones are ready, those that Ray is to have beside them are starting, those beyond its target leave."""
        target = ray.target if model.desired is None else model.desired
        serving = sorted((w for w in workers if w.serves), key=lambda w: model.since.get(w.worker_id, ("", now))[1])
        states: dict[str, ReplicaState] = {w.worker_id: "ready" for w in serving[:target]}
        states |= {w.worker_id: "draining" for w in workers if w.worker_id not in states}
        started = [name for name, state in states.items() if state == "ready" and name not in model.since]
        self._started(model, started, now)
        missing = target - len(serving[:target])
        states |= {f"{spec.name}-starting-{number}": "starting" for number in range(missing)}
        unlinked = max(ray.leaving - sum(state == "draining" for state in states.values()), 0)
        states |= {f"{spec.name}-leaving-{number}": "draining" for number in range(unlinked)}
        model.since = {
            name: before if (before := model.since.get(name)) is not None and before[0] == state else (state, now)
            for name, state in states.items()
        }
        if not missing or serving:
            model.starting_since_s = 0.0
        elif not model.starting_since_s:
            model.starting_since_s = wall_s - (now - min(model.ordered_at, default=now))
        told = {worker.worker_id: worker for worker in workers}
        return [
            ReplicaSeen(
                replica_id=name,
                state=state,
                since_s=model.since[name][1],
                gpu=spec.gpu,
                running=told[name].running if name in told else 0,
                kv_use=told[name].kv_use if name in told else 0.0,
            )
            for name, state in states.items()
        ]

    def _started(self, model: _Model, names: Sequence[str], now: float) -> None:
        """Replicas that serve for the first time: how long after the decision, where it was made here."""
        for _ in names:
            if not model.ordered_at:
                return
            took_s = now - model.ordered_at.pop(0)
            model.cold_start_s += (took_s - model.cold_start_s) * (NEWEST if model.cold_start_s else 1.0)

    def _standing(self, spec: ModelSpec, model: _Model, ray: OnRay, replicas: Sequence[ReplicaSeen]) -> ModelScaling:
        frozen = self.settings.frozen or self.asked.all_frozen or spec.name in self.asked.frozen
        return ModelScaling(
            name=spec.name,
            target=ray.target,
            running=sum(one.state == "ready" for one in replicas),
            starting=sum(one.state == "starting" for one in replicas),
            desired=ray.target if model.desired is None else model.desired,
            min_replicas=spec.min_replicas,
            max_replicas=max(spec.max_replicas, spec.min_replicas),
            idle_s=spec.idle_s,
            by="frozen" if frozen else "manual" if spec.name in self.asked.manual else "demand",
            why=model.decisions[-1].why if model.decisions else "",
            cold_start_s=model.cold_start_s,
        )

    def _keep(self, decision: Decision, now: float, wall_s: float) -> tuple[str, ScalingDecision] | None:
        """Take a decision over; the decision if it differs from the last."""
        model, spec = self._models[decision.model], self._specs[decision.model]
        assert model.standing is not None, "it has been looked at"
        before, wanted = model.standing.desired, decision.total
        if self._frozen(spec.name):
            wanted = before
        if wanted > before:
            model.ordered_at += [now] * (wanted - before)
        elif wanted < before:
            del model.ordered_at[max(len(model.ordered_at) - (before - wanted), 0) :]
        model.desired, model.numbers = wanted, dict(decision.numbers)
        action = _action(before, wanted)
        made = ScalingDecision(wall_s, before, wanted, action, decision.why, dict(decision.numbers))
        model.standing = dataclasses.replace(model.standing, desired=wanted, why=decision.why)
        model.counts[action] = model.counts.get(action, 0) + 1
        last = model.decisions[-1] if model.decisions else None
        if action == "hold" and last is not None and (last.action, last.why) == ("hold", decision.why):
            model.decisions[-1] = dataclasses.replace(last, numbers=made.numbers, passes=last.passes + 1)
            return None
        model.decisions.append(made)
        return None if action == "hold" else (spec.name, made)

    def _hold(self, wall_s: float) -> Sequence[tuple[str, ScalingDecision]]:
        """Nobody tells what the demand is; but bounds hold, what an operator asks is done, and a new model begins."""
        made = []
        for name, model in self._models.items():
            assert model.standing is not None, "it has been looked at"
            spec, before = self._specs[name], model.standing.desired
            within = min(max(before, spec.min_replicas), max(spec.max_replicas, spec.min_replicas))
            wanted = before if self._frozen(name) else self.asked.manual.get(name, within)
            model.desired = wanted
            if wanted != before:
                why = "manual" if name in self.asked.manual else "bounds"
                decision = ScalingDecision(wall_s, before, wanted, _action(before, wanted), why)
                model.decisions.append(decision)
                made.append((name, decision))
            model.standing = dataclasses.replace(model.standing, desired=wanted, why="no gateway is linked")
        return made

    def _frozen(self, name: str) -> bool:
        return self.settings.frozen or self.asked.all_frozen or name in self.asked.frozen

    # ---- what others ask

    def standing(self, name: str) -> ModelScaling:
        """How a model stands. KeyError for one that is not wanted."""
        standing = self._models[name].standing
        return standing if standing is not None else ModelScaling(name)

    def story(self, name: str, limit: int = 0) -> ScalingStory:
        """Why it stands so. KeyError for one that is not wanted."""
        model = self._models[name]
        return ScalingStory(self.standing(name), list(model.decisions)[-limit if limit else 0 :], self._numbers(model))

    def _numbers(self, model: _Model) -> Mapping[str, float]:
        numbers = dict(model.numbers)
        costs = model.costs.costs()
        if costs is not None:
            numbers |= {
                "learnt_step_s": costs.fixed_s,
                "learnt_decode_s_a_token": costs.decode_s,
                "learnt_prefill_s_a_token": costs.prefill_s,
            }
        return numbers

    def counters(self) -> Mapping[str, tuple[Mapping[str, int], float]]:
        """By model: decisions by action, and GPU-seconds held, since this began."""
        return {name: (dict(one.counts), one.gpu_seconds) for name, one in self._models.items()}

    @property
    def names(self) -> Sequence[str]:
        """Of the models that are wanted."""
        return list(self._models)

    def find(self, name: str) -> ModelSpec | None:
        """By name or alias."""
        found = self._specs.get(name)
        return found or next((spec for spec in self._specs.values() if name in spec.aliases), None)


def world_size(spec: ModelSpec) -> int:
    """GPUs that one replica takes."""
    return spec.tensor_parallel_size * spec.pipeline_parallel_size


def _action(before: int, wanted: int) -> str:
    if wanted == before:
        return "hold"
    if wanted > before:
        return "up" if before else "from_zero"
    return "down" if wanted else "to_zero"
