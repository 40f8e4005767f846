"""The catalog that gateways get, derived in each pass from the desired models, Ray and the workers' reports."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import structlog

from cluster.api.adapters import AdapterSpec
from cluster.api.types import CatalogEntry, ModelSpec, ModelState, VersionShare
from cluster.controller.desired_models import DesiredModels
from cluster.controller.links import FleetWorker
from cluster.policy.catalog import lifecycle, reconcile
from cluster.policy.catalog.held import held_entry
from cluster.policy.catalog.lifecycle import ModelObservation, SourceFacts, WorkerReport
from cluster.policy.catalog.placement import why_unplaceable
from cluster.policy.catalog.reconcile import Observed
from cluster.policy.catalog.versions import ReplicaShare
from cluster.ray.backend import RaySnapshot
from cluster.wire.lost_engines import LostEngine
from cluster.worker.settings import ReplicaSettings

log = structlog.get_logger("controller")


@dataclass(frozen=True, slots=True)
class ControllerPass:
    """Observations and decisions of one pass of the control loop."""

    at_s: float
    """Time of the pass, in seconds since the epoch."""
    snapshot: RaySnapshot
    fleet: Sequence[FleetWorker]
    lost: Sequence[LostEngine]
    """Engines that ended in the last minutes."""
    linked: bool
    """Whether the controller is linked to a gateway."""
    wanted: Sequence[reconcile.Wanted]
    retired: Collection[str]
    """Names of the applications that get no new calls."""


class PublishedCatalog:
    """The catalog as last published, and the state of each version in the catalog."""

    def __init__(self, known: Mapping[str, SourceFacts] | None = None) -> None:
        """`known`: properties that were read from the models' sources. The keys are names of applications."""
        self._known = {} if known is None else known
        self._states: dict[tuple[str, str], ModelState] = {}
        self._entries: dict[str, CatalogEntry] = {}
        self._cold_starts_s: dict[str, float] = {}

    def __repr__(self) -> str:
        return ", ".join(f"{name} {entry.state.value}" for name, entry in self._entries.items()) or "no models yet"

    def entries(self) -> Sequence[CatalogEntry]:
        """Return the catalog as last published."""
        return tuple(self._entries.values())

    def preview(self, spec: ModelSpec, shares: Sequence[ReplicaShare]) -> CatalogEntry:
        """Return a model's last published entry, but with the new `shares` of its versions. `spec`: spec of the stable
        version."""
        last = self._entries.get(spec.name) or lifecycle.entry(spec, ModelState.DECLARED, None)
        before = {share.version: share for share in last.versions}
        versions = tuple(
            replace(
                before.get(part.version) or VersionShare(part.version),
                weight=part.weight,
                quarantined=part.quarantined,
                state_reason=part.gone or ("quarantined" if part.quarantined else ""),
            )
            for part in shares
        )
        return replace(last, versions=versions)

    def declare(self, models: DesiredModels, reason: str) -> Sequence[CatalogEntry]:
        """Set a first catalog with all wanted models in state DECLARED. `reason`: why Ray has not been observed yet."""
        for name, variants in models.variants.items():
            known = SourceFacts(trouble=reason)
            declared = lifecycle.entry(variants[0].spec, ModelState.DECLARED, None, known=known)
            self._entries[name] = replace(declared, adapters=models.adapters.get(name, ()))
        return self.entries()

    def update(
        self, models: DesiredModels, seen: ControllerPass, add_scaling: Callable[[CatalogEntry], CatalogEntry]
    ) -> Sequence[CatalogEntry]:
        """Set the catalog from what one pass of the controller has observed (`seen`), and return its entries. `models`:
        the models that should run. `add_scaling`: adds the scaler's fields to an entry."""
        apps = seen.snapshot.apps.values()
        on_ray = {app.model for app in apps}
        entries: dict[str, CatalogEntry] = {}
        for model in models.variants:
            parts = [(part, models.version(model, part.version)) for part in models.shares(model)]
            entries[model] = lifecycle.entry_of(
                [self._version(seen, part, variants[0].spec, variants) for part, variants in parts],
                retired=[app.digest for app in apps if app.model == model and app.app in seen.retired],
                cold_start_s=self._cold_starts_s.get(model, 0.0),
            )
        for model, spec in models.leaving(on_ray).items():  # nothing is retired: waiting calls are still served
            version = self._version(seen, ReplicaShare(spec.version, 0.0), spec, ())
            entries[model] = lifecycle.entry_of([version], cold_start_s=self._cold_starts_s.get(model, 0.0))
        for model, spec in models.held(on_ray).items():
            reported = [_reported(worker) for worker in seen.fleet if worker.model == model]
            entries[model] = held_entry(spec, [app for app in apps if app.model == model], reported)
        published = {(name, share.version) for name, entry in entries.items() for share in entry.versions}
        self._states = {key: state for key, state in self._states.items() if key in published}
        filled = {name: lifecycle.fill_from_earlier(self._entries.get(name), entry) for name, entry in entries.items()}
        self._entries = {
            name: replace(
                add_scaling(entry),
                replicas_desired=entry.replicas_desired,  # counts all versions' replicas
                adapters=self._adapters(models, name),
            )
            for name, entry in filled.items()
        }
        return self.entries()

    def _adapters(self, models: DesiredModels, name: str) -> tuple[AdapterSpec, ...]:
        """Return the adapters of a model. If the model is held (its replicas are left as they are) or is being removed,
        these are the adapters that were published last."""
        if name in models.variants:
            return models.adapters.get(name, ())
        before = self._entries.get(name)
        return before.adapters if before is not None else ()

    def _version(
        self, seen: ControllerPass, part: ReplicaShare, spec: ModelSpec, variants: Sequence[ReplicaSettings]
    ) -> lifecycle.Version:
        """Return the state of a version of a model in this pass.

        `part`: the version and its share of the calls. `spec`: the model's spec for this version. `variants`: the
        version's replica settings for each GPU type; empty if the model is being removed.
        """
        leaving = not variants
        wanted = [app for app in seen.wanted if (app.model, app.version) == (spec.name, part.version)]
        current = [seen.snapshot.apps[app.app] for app in wanted if app.app in seen.snapshot.apps]
        before = [
            app
            for app in seen.snapshot.apps.values()
            if app.model == spec.name
            and (leaving or (app.version in (part.version, "") and app.app not in seen.retired))
            and app not in current
        ]
        merged = lifecycle.merge_applications(current, before)
        unplaceable = _unplaceable(variants, seen.snapshot)
        workers = [w for w in seen.fleet if w.model == spec.name and w.version in (part.version, "")]
        observation = lifecycle.observe(not leaving and not part.gone, merged, unplaceable)
        if observation is ModelObservation.SERVING and not workers and seen.linked:
            observation = ModelObservation.STARTING  # replicas run, but no gateway is linked to one yet
        state = self._advance(spec.name, part, observation, merged, seen.at_s)
        return lifecycle.Version(
            spec,
            part,
            state,
            merged,
            [_reported(worker) for worker in workers],
            self._known.get(variants[0].app) if variants else None,
            unplaceable if state is ModelState.FAILED else "",
            sum(app.replicas for app in wanted),
            changing=bool(before) and any(not app.running for app in current),
            lost=_engine_ends(seen.lost, spec.name, part.version, [variant.digest for variant in variants]),
        )

    def _advance(
        self, model: str, part: ReplicaShare, observation: ModelObservation, seen: Observed | None, now_s: float
    ) -> ModelState:
        """Update the state of a model's version after an observation; return the new state. Log a change of the state.

        `part`: the version and its share of the calls. `seen`: the version's application on Ray; None if there is none.
        """
        key = (model, part.version)
        before = self._states.get(key, ModelState.DECLARED)
        state = lifecycle.next_state(ModelState.DECLARED if before is ModelState.GONE else before, observation)
        self._states[key] = state
        if state is not before:
            why = part.gone or (seen.trouble if seen else "")
            log.info("model.state_changed", model=model, version=part.version, state=state.value, reason=why)
            if state is ModelState.READY and before is ModelState.LOADING and seen is not None:
                self._cold_starts_s.setdefault(model, round(now_s - seen.deployed_at_s, 1))
        return state


def _engine_ends(lost: Sequence[LostEngine], model: str, version: str, generations: Sequence[str]) -> str:
    """Return a text that says when and why engines of a version ended recently."""
    return lifecycle.summarize_ends(
        [
            (engine.at_s, engine.reason)
            for engine in lost
            if engine.model == model and engine.version in (version, "") and engine.generation in (*generations, "")
        ]
    )


def _unplaceable(variants: Sequence[ReplicaSettings], snapshot: RaySnapshot) -> str:
    """Return why a version cannot be placed on Ray's nodes: the reason for the first of `variants`. Returns "" if at
    least one variant can be placed."""
    reasons = [why_unplaceable(variant.spec, snapshot.nodes_of(variant.ray_cluster)) for variant in variants]
    return reasons[0] if reasons and all(reasons) else ""


def _reported(worker: FleetWorker) -> WorkerReport:
    return WorkerReport(
        weight_digest=worker.weight_digest,
        bundle_digest=worker.bundle_digest,
        max_model_len=worker.max_model_len,
        engine_class=worker.engine_class,
        default_sampling=worker.default_sampling,
        tasks=worker.tasks,
    )
