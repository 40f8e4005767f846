"""Input values of the scaler: its settings, operators' requests, the replicas on Ray, and the workers. Without I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.api.demand import ComputedWork
from cluster.api.types import ModelSpec
from cluster.policy.scaling.replica_rates import ReplicaLimits

Kind = tuple[str, str]
"""A model and a type of GPU."""


@dataclass(frozen=True, slots=True)
class ScalingSettings:
    """Values from the section `scaling` of the configuration."""

    gpu_budget: Mapping[str, int] = field(default_factory=dict)
    cold_start_s: float = 60.0
    frozen: bool = False


@dataclass(frozen=True, slots=True)
class OperatorRequest:
    """Requests of operators about scaling. The number of replicas of a frozen model is not changed.

    `manual`: number of replicas by model. `frozen`: names of frozen models. `all_frozen`: every model is frozen,
    including models that are added later.
    """

    manual: Mapping[str, int] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    all_frozen: bool = False

    def is_frozen(self, model: str) -> bool:
        """Return whether a model is frozen, by its name or because all models are."""
        return self.all_frozen or model in self.frozen

    def decided_by(self, model: str) -> str:
        """Return what decides the model's number of replicas: frozen, manual or demand."""
        return "frozen" if self.is_frozen(model) else "manual" if model in self.manual else "demand"


@dataclass(frozen=True, slots=True)
class RayReplicas:
    """Replicas of a model on one type of GPU, as Ray reports them.

    Numbers of replicas: `target` should run, `running` serve, `placed` are starting, `leaving` are stopping.
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
    """A worker that is connected to at least one gateway.

    `serves`: whether the worker accepts new calls. `gpu`: type of GPU for which the worker was started; a type that the
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


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """Inputs of the scaler about one model, for one pass. `types`: specs of the model, one for each type of GPU, the
    preferred type first.

    The keys of the mappings are types of GPU. `rays`: replicas on Ray. `workers`: connected workers, with an entry for
    each type. `room`: number of replicas that fit; a type without an entry has enough capacity.
    """

    types: tuple[ModelSpec, ...]
    rays: Mapping[str, RayReplicas]
    workers: Mapping[str, Sequence[WorkerSeen]]
    room: Mapping[str, int]


def inputs_by_model(
    specs: Sequence[ModelSpec],
    on_ray: Mapping[Kind, RayReplicas],
    workers: Sequence[WorkerSeen],
    room: Mapping[Kind, int],
) -> dict[str, ModelInputs]:
    """Return the inputs of one pass of the scaling policy, by model name. Several `specs` with one name describe one
    model on several types of GPU. `on_ray`: replicas as Ray reports them. `room`: number of further replicas that fit.
    Replicas and workers of models without a spec are left out."""
    types: dict[str, tuple[ModelSpec, ...]] = {}
    for spec in specs:
        types[spec.name] = (*types.get(spec.name, ()), spec)
    workers_of: dict[str, dict[str, list[WorkerSeen]]] = {
        name: {spec.gpu: [] for spec in of_model} for name, of_model in types.items()
    }
    for worker in workers:
        if worker.model in workers_of:
            of_type = workers_of[worker.model]
            of_type.get(worker.gpu, next(iter(of_type.values()))).append(worker)
    return {
        name: ModelInputs(
            of_model,
            _by_type(of_model, on_ray),
            workers_of[name],
            {spec.gpu: room[name, spec.gpu] for spec in of_model if (name, spec.gpu) in room},
        )
        for name, of_model in types.items()
    }


def _by_type(types: Sequence[ModelSpec], on_ray: Mapping[Kind, RayReplicas]) -> dict[str, RayReplicas]:
    """Return the replicas of a model on Ray, by type of GPU. A type that the model does not have counts as the model's
    first type."""
    gpus = [spec.gpu for spec in types]
    by_gpu: dict[str, RayReplicas] = {}
    for (name, gpu), ray in on_ray.items():
        if name == types[0].name:
            gpu = gpu if gpu in gpus else gpus[0]
            by_gpu[gpu] = by_gpu.get(gpu, RayReplicas()) + ray
    return by_gpu
