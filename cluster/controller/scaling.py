"""Scaling in the controller: the scaler's inputs from Ray and workers, stored operator requests, logs and metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from cluster.api.demand import ModelDemand
from cluster.api.scaling import ScalingDecision
from cluster.api.types import DrainState
from cluster.config.schema import Config
from cluster.controller.desired_models import DesiredModels
from cluster.controller.links import FleetWorker
from cluster.observe.metrics import Metrics
from cluster.policy.catalog.placement import capacity, why_unplaceable
from cluster.policy.catalog.reconcile import Observed
from cluster.policy.catalog.versions import total_for
from cluster.policy.scaling.inputs import Kind, OperatorRequest, RayReplicas, ScalingSettings, WorkerSeen
from cluster.policy.scaling.operator_requests import requests_from_json, requests_to_json
from cluster.policy.scaling.replica_rates import ReplicaLimits
from cluster.policy.scaling.scaler import Scaler
from cluster.process.private_files import replace_file
from cluster.ray.backend import RaySnapshot
from cluster.worker.settings import ReplicaSettings

log = structlog.get_logger("scaling")


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


def requested_on_ray(
    models: DesiredModels, snapshot: RaySnapshot, retired: Container[str]
) -> Mapping[Kind, RayReplicas]:
    """Return the replica counts on Ray by model and GPU type. Retired applications are left out.

    The target in each count is the number of replicas that the scaler has requested. The target that Ray has may be
    higher: a canary may have more replicas than its share of the calls, and a rollout adds replacements.
    """
    counts = on_ray(seen for app, seen in snapshot.apps.items() if app not in retired)
    for model, variants in models.variants.items():
        parts = models.shares(model)
        versions = {part.version for part in parts if not part.gone}
        apps = [snapshot.apps.get(variant.app) for variant in variants if variant.spec.version in versions]
        targets: dict[str, int] = {}
        for seen in apps:
            if seen is not None:
                targets[seen.gpu] = targets.get(seen.gpu, 0) + seen.target
        for kind in [kind for kind in counts if targets and kind[0] == model]:
            counts[kind] = replace(counts[kind], target=total_for(targets.get(kind[1], 0), parts))
    return counts


def room(models: DesiredModels, snapshot: RaySnapshot) -> Mapping[Kind, int]:
    """Return how many replicas of each model fit on the nodes of each GPU type while the existing replicas of other
    models stay. Only models with several GPU types are included."""
    free: dict[Kind, int] = {}
    for model in models.variants:
        types = models.stable(model)
        for settings in types if len(types) > 1 else ():
            others = [
                (variant.spec, seen.running + seen.placed)
                for other, variants in models.variants.items()
                for variant in variants
                if other != model and variant.ray_cluster == settings.ray_cluster
                if (seen := snapshot.apps.get(variant.app)) is not None
            ]
            free[model, settings.spec.gpu] = capacity(settings.spec, snapshot.nodes_of(settings.ray_cluster), others)
    return free


def has_room(settings: ReplicaSettings, models: DesiredModels, snapshot: RaySnapshot) -> bool:
    """Return whether Ray's nodes could hold one more replica with these settings than serve now. The replicas of all
    other wanted applications stay; applications that are no longer wanted count as gone."""
    nodes = snapshot.nodes_of(settings.ray_cluster)
    if why_unplaceable(settings.spec, nodes):
        return False
    others = [
        (variant.spec, seen.running + seen.placed)
        for variants in models.variants.values()
        for variant in variants
        if variant.app != settings.app and variant.ray_cluster == settings.ray_cluster
        if (seen := snapshot.apps.get(variant.app)) is not None
    ]
    own = snapshot.apps.get(settings.app)
    return capacity(settings.spec, nodes, others) > (own.running if own is not None else 0)


def workers_of(fleet: Sequence[FleetWorker], gpus: Mapping[str, str] | None = None) -> list[WorkerSeen]:
    """Convert workers to the scaler's type WorkerSeen.

    `gpus`: GPU type by digest of replica settings. A worker reports the digest of its settings as its `generation`.
    """
    types = gpus or {}
    return [
        WorkerSeen(
            worker_id=worker.worker_id,
            incarnation=worker.incarnation,
            model=worker.model,
            gpu=types.get(worker.generation, ""),
            serves=worker.drain_state is DrainState.SERVING,
            running=worker.running,
            kv_use=worker.kv_usage,
            work=worker.work,
            limits=ReplicaLimits(worker.max_num_seqs, worker.max_num_batched_tokens, worker.kv_tokens)
            if worker.max_num_seqs
            else None,
        )
        for worker in fleet
    ]


class DemandRecorder:
    """A links.DemandListener that records the gateways' demand reports for the scaler.

    When calls are held because their model has no worker, the next pass of the controller begins at once.
    """

    def __init__(self, scaler: Scaler, wake: Callable[[], None], now: Callable[[], float] = time.monotonic) -> None:
        self._scaler = scaler
        self._wake = wake
        self._now = now

    def record_demand(self, gateway: str, demand: Sequence[ModelDemand], counting_s: float) -> None:
        """Record a gateway's demand."""
        if self._scaler.demands.record_report(gateway, demand, counting_s, self._now()):
            self._scaler.decide_next_pass()
            self._wake()

    def record_disconnect(self, gateway: str) -> None:
        """Record that the link to a gateway has ended."""
        self._scaler.demands.record_disconnect(gateway)


def log_decisions(decisions: Sequence[tuple[str, ScalingDecision]]) -> None:
    """Log every scaling decision with the numbers on which it is based. `decisions`: pairs of model and decision."""
    for model, decision in decisions:
        numbers = {name: round(value, 4) for name, value in decision.numbers.items()}
        log.info(
            "scaling.decided",
            model=model,
            action=decision.action,
            before=decision.before,
            replicas=decision.replicas,
            reason=decision.why,
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
            log.warning("scaling.requests_not_read", path=str(self._path), reason=str(error))
            return OperatorRequest()

    def keep(self, request: OperatorRequest) -> None:
        """Replace the content of the file atomically with `request`."""
        replace_file(self._path, json.dumps(requests_to_json(request)))


class Counters:
    """The controller's counters in the metrics of the process. After each pass, the scaler's counts are added."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._before: dict[str, tuple[Mapping[str, int], float]] = {}

    def count_rollback(self, model: str) -> None:
        """Count a canary that was rolled back automatically."""
        self._metrics.count("canary_rollbacks_total", model)

    def count(self, scaler: Scaler) -> None:
        """Add to the metrics the increase of the scaler's counters since the previous call of this method."""
        for model, (actions, gpu_seconds) in scaler.counters().items():
            actions_before, gpu_seconds_before = self._before.get(model, ({}, 0.0))
            for action, count in actions.items():
                if increase := count - actions_before.get(action, 0):
                    self._metrics.count("scaling_decisions_total", model, action, by=increase)
            self._metrics.count("gpu_seconds_total", model, by=gpu_seconds - gpu_seconds_before)
            self._before[model] = (actions, gpu_seconds)
