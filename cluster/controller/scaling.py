"""The scaler's place in the controller's process: what it sees of Ray and the fleet, what it keeps, what it tells."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import structlog

from cluster.api.scaling import ScalingDecision
from cluster.config.schema import Config
from cluster.controller.links import FleetWorker
from cluster.observe.metrics import Metrics
from cluster.policy.catalog.reconcile import Observed
from cluster.policy.scaling.operator_requests import asked_from_json, asked_to_json
from cluster.policy.scaling.replica_rates import ReplicaLimits
from cluster.policy.scaling.scaler import Kind, OnRay, OperatorRequest, Scaler, ScalingSettings, WorkerSeen

log = structlog.get_logger("scaling")


class DemandSource(Protocol):
    """Where demand comes from (link.controller.ControllerLinks)."""

    on_demand: Callable[..., None]
    on_left: Callable[[str], None]


def settings_of(config: Config) -> ScalingSettings:
    """The file's `scaling` section."""
    scaling = config.scaling
    return ScalingSettings(dict(scaling.gpu_budget), scaling.cold_start_s, scaling.frozen)


def on_ray(apps: Iterable[Observed]) -> dict[Kind, OnRay]:
    """By model and type of GPU; what is being deleted counts no more."""
    found: dict[Kind, OnRay] = {}
    for app in apps:
        if not app.deleting:
            kind = app.model, app.gpu
            found[kind] = found.get(kind, OnRay()) + OnRay(app.target, app.running, app.placed, app.leaving)
    return found


def workers_of(fleet: Sequence[FleetWorker], gpus: Mapping[str, str] | None = None) -> list[WorkerSeen]:
    """As the scaler sees them. `gpus`: the types that their applications were made for, by generation."""
    types = gpus or {}
    return [
        WorkerSeen(
            worker_id=one.worker_id,
            incarnation=one.incarnation,
            model=one.model,
            gpu=types.get(one.generation, ""),
            serves=one.standing == "SERVING",
            running=one.running,
            kv_use=one.kv_usage,
            work=one.work,
            limits=ReplicaLimits(one.max_num_seqs, one.max_num_batched_tokens, one.kv_tokens)
            if one.max_num_seqs
            else None,
        )
        for one in fleet
    ]


def listen(source: DemandSource, scaler: Scaler, now: Callable[[], float], wake: Callable[[], None]) -> None:
    """Let demand reach the scaler as it comes; calls that are held wake the controller at once."""

    def demand(gateway: str, told: Sequence[object], counting_s: float) -> None:
        if scaler.demands.told(gateway, told, counting_s, now()):  # type: ignore[arg-type]
            scaler.hurry()
            wake()

    source.on_demand = demand
    source.on_left = scaler.demands.left


def tell(decisions: Sequence[tuple[str, ScalingDecision]]) -> None:
    """Every decision, with its numbers, into the log."""
    for model, one in decisions:
        numbers = {name: round(value, 4) for name, value in one.numbers.items()}
        log.info(
            "scaled", model=model, action=one.action, before=one.before, replicas=one.replicas, why=one.why, **numbers
        )


class AskedFile:
    """What operators have asked, kept for the next controller."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> OperatorRequest:
        """What was kept; nothing where there is nothing, or nothing that can be read."""
        try:
            return asked_from_json(json.loads(self._path.read_text()))
        except FileNotFoundError:
            return OperatorRequest()
        except (OSError, ValueError, AttributeError) as error:
            log.warning("asked_unreadable", path=str(self._path), reason=str(error))
            return OperatorRequest()

    def keep(self, asked: OperatorRequest) -> None:
        """Write it whole."""
        draft = self._path.with_suffix(".new")
        draft.write_text(json.dumps(asked_to_json(asked)))
        draft.replace(self._path)


class Counters:
    """The scaler's counters in a process's metrics, after each pass."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._before: dict[str, tuple[Mapping[str, int], float]] = {}

    def count(self, scaler: Scaler) -> None:
        """What has come since the last time."""
        for model, (actions, gpu_seconds) in scaler.counters().items():
            before, held = self._before.get(model, ({}, 0.0))
            for action, count in actions.items():
                if grown := count - before.get(action, 0):
                    self._metrics.count("scaling_decisions_total", model, action, by=grown)
            self._metrics.count("gpu_seconds_total", model, by=gpu_seconds - held)
            self._before[model] = (actions, gpu_seconds)
