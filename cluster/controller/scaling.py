"""Scaling in the controller's process: inputs from Ray and the workers, stored operator requests, logs and metrics."""

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
from cluster.policy.scaling.operator_requests import requests_from_json, requests_to_json
from cluster.policy.scaling.replica_rates import ReplicaLimits
from cluster.policy.scaling.scaler import Kind, OperatorRequest, RayReplicas, Scaler, ScalingSettings, WorkerSeen

log = structlog.get_logger("scaling")


class DemandSource(Protocol):
    """Source of demand reports (links.ControllerLinks)."""

    on_demand: Callable[..., None]
    on_gateway_left: Callable[[str], None]


def settings_of(config: Config) -> ScalingSettings:
    """Return the scaler's settings from the `scaling` section of the configuration."""
    scaling = config.scaling
    return ScalingSettings(dict(scaling.gpu_budget), scaling.cold_start_s, scaling.frozen)


def on_ray(apps: Iterable[Observed]) -> dict[Kind, RayReplicas]:
    """Return the replica counts on Ray by model and GPU type. Applications that are being deleted are left out."""
    replicas: dict[Kind, RayReplicas] = {}
    for app in apps:
        if not app.deleting:
            kind = app.model, app.gpu
            replicas[kind] = replicas.get(kind, RayReplicas()) + RayReplicas(
                app.target, app.running, app.placed, app.leaving
            )
    return replicas


def workers_of(fleet: Sequence[FleetWorker], gpus: Mapping[str, str] | None = None) -> list[WorkerSeen]:
    """Return the workers as WorkerSeen, the scaler's type. `gpus`: the GPU type of a worker, by the worker's
    generation."""
    types = gpus or {}
    return [
        WorkerSeen(
            worker_id=worker.worker_id,
            incarnation=worker.incarnation,
            model=worker.model,
            gpu=types.get(worker.generation, ""),
            serves=worker.standing == "SERVING",
            running=worker.running,
            kv_use=worker.kv_usage,
            work=worker.work,
            limits=ReplicaLimits(worker.max_num_seqs, worker.max_num_batched_tokens, worker.kv_tokens)
            if worker.max_num_seqs
            else None,
        )
        for worker in fleet
    ]


def connect_demand(source: DemandSource, scaler: Scaler, now: Callable[[], float], wake: Callable[[], None]) -> None:
    """Pass reported demand to the scaler. When calls are held for a model without workers, begin the next pass at
    once."""

    def on_demand(gateway: str, demand: Sequence[object], counting_s: float) -> None:
        if scaler.demands.record_report(gateway, demand, counting_s, now()):  # type: ignore[arg-type]
            scaler.decide_next_pass()
            wake()

    source.on_demand = on_demand
    source.on_gateway_left = scaler.demands.record_disconnect


def log_decisions(decisions: Sequence[tuple[str, ScalingDecision]]) -> None:
    """Log every scaling decision with the numbers of the decision."""
    for model, decision in decisions:
        numbers = {name: round(value, 4) for name, value in decision.numbers.items()}
        log.info(
            "scaled",
            model=model,
            action=decision.action,
            before=decision.before,
            replicas=decision.replicas,
            why=decision.why,
            **numbers,
        )


class OperatorRequestFile:
    """File with the operators' scaling requests. The next controller continues from this file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> OperatorRequest:
        """Return the stored requests, or an empty OperatorRequest if the file does not exist or cannot be read."""
        try:
            return requests_from_json(json.loads(self._path.read_text()))
        except FileNotFoundError:
            return OperatorRequest()
        except (OSError, ValueError, AttributeError) as error:
            log.warning("scaling_requests_unreadable", path=str(self._path), reason=str(error))
            return OperatorRequest()

    def keep(self, request: OperatorRequest) -> None:
        """Replace the content of the file atomically with `request`."""
        draft = self._path.with_suffix(".new")
        draft.write_text(json.dumps(requests_to_json(request)))
        draft.replace(self._path)


class Counters:
    """Copies the scaler's counters into the process's metrics after each pass."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._before: dict[str, tuple[Mapping[str, int], float]] = {}

    def count(self, scaler: Scaler) -> None:
        """Add to the metrics how much the scaler's counters have grown since the last call."""
        for model, (actions, gpu_seconds) in scaler.counters().items():
            actions_before, gpu_seconds_before = self._before.get(model, ({}, 0.0))
            for action, count in actions.items():
                if increase := count - actions_before.get(action, 0):
                    self._metrics.count("scaling_decisions_total", model, action, by=increase)
            self._metrics.count("gpu_seconds_total", model, by=gpu_seconds - gpu_seconds_before)
            self._before[model] = (actions, gpu_seconds)
