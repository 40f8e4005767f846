"""The control loop: observe Ray, compare Ray's state with the configuration, take the next steps, publish the catalog.

A pass runs every second. The loop keeps no state that a new observation could not restore. After a restart or an outage
of Ray, the first observation is therefore enough to continue. While Ray is unreachable, the last catalog stays
published and the running replicas keep serving.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import structlog

from cluster.api.demand import ModelDemand
from cluster.api.types import CatalogEntry, ModelSpec, ModelState, VersionShare, VersionTally
from cluster.controller import scaling
from cluster.controller.links import FleetWorker
from cluster.policy.catalog import lifecycle, reconcile
from cluster.policy.catalog.canary import CanaryTally, judge
from cluster.policy.catalog.held import held_entry
from cluster.policy.catalog.lifecycle import SourceFacts, WorkerReport
from cluster.policy.catalog.placement import capacity, why_unplaceable
from cluster.policy.catalog.reconcile import Observed
from cluster.policy.catalog.versions import ReplicaShare, VersionOverride, replicas_of, shares, total_for
from cluster.policy.scaling.scaler import Scaler
from cluster.ray.backend import Backend, RayAway, RaySnapshot
from cluster.wire.lost_engines import LostEngine
from cluster.worker.settings import ReplicaSettings

log = structlog.get_logger("controller")

PERIOD_S = 1.0
QUIET_S = 3.0
"""Seconds from an application's retirement until the application may count as empty. By then the gateways have reported
the application's load."""


class GatewayPort(Protocol):
    """The part of ControllerLinks (links.py) that the loop uses."""

    def publish(self, entries: Sequence[CatalogEntry]) -> None:
        """Send the catalog to every gateway."""

    def fleet(self) -> Sequence[FleetWorker]:
        """Return the workers that are linked to at least one gateway."""

    def lost(self) -> Sequence[LostEngine]:
        """Return the engines that ended in the last minutes, oldest first."""

    def demand(self) -> Sequence[ModelDemand]:
        """Return the demand by model, summed over gateways."""

    def tallies(self) -> Sequence[VersionTally]:
        """Return each gateway's call counts for canaries and for the stable versions that canaries are compared
        with."""

    @property
    def linked(self) -> int:
        """Number of gateways that the controller is linked to."""


@dataclass(eq=False, slots=True, repr=False)
class Controller:
    """The control loop of one cluster.

    `want` sets the desired models, `step` runs one pass, and `run` runs a pass every second and after each change. A
    model's variants are the ReplicaSettings of the model, one for each version and GPU type on which the model may run.
    """

    backend: Backend
    gateways: GatewayPort
    wall_s: Callable[[], float] = time.time
    known: dict[str, SourceFacts] = field(default_factory=dict)
    """Properties that were read from the models' sources, by application."""
    drain_timeout_s: float = 300.0
    """Seconds that running calls may stay on a retired application, which gets no new calls. Then the application is
    deleted, and the calls resume on other workers or fail."""
    marks: dict[str, dict[str, VersionOverride]] = field(default_factory=dict)
    """Overrides of the configuration, by model and version. Operators and automatic rollbacks set overrides."""
    on_mark: Callable[[], None] = lambda: None
    """Called when `marks` has changed."""
    scaler: Scaler = field(default_factory=Scaler)
    now: Callable[[], float] = time.monotonic
    on_scaling_pass: Callable[[], None] = lambda: None
    """Called after each pass of the scaler."""
    _wanted: dict[str, tuple[ReplicaSettings, ...]] = field(default_factory=dict)
    _states: dict[tuple[str, str], ModelState] = field(default_factory=dict)
    _entries: dict[str, CatalogEntry] = field(default_factory=dict)
    _leaving: dict[str, ModelSpec] = field(default_factory=dict)
    _cold_starts_s: dict[str, float] = field(default_factory=dict)
    _retired_since_s: dict[str, float] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _held: dict[str, ModelSpec] = field(default_factory=dict)
    _hold_all: bool = False
    _away: str = ""

    def __repr__(self) -> str:
        states = ", ".join(f"{name} {entry.state.value}" for name, entry in self._entries.items())
        return f"Controller({states or 'no models yet'}{f'; Ray is away: {self._away}' if self._away else ''})"

    def want(self, settings: Sequence[ReplicaSettings]) -> None:
        """Set the replicas that should run, and begin the next pass at once.

        `settings` lists the variants of each model: the stable version before the canary, the preferred GPU type first.
        """
        wanted: dict[str, tuple[ReplicaSettings, ...]] = {}
        for variant in settings:
            wanted[variant.spec.name] = (*wanted.get(variant.spec.name, ()), variant)
        self._leaving |= {name: variants[0].spec for name, variants in self._wanted.items() if name not in wanted}
        self._wanted = wanted
        versions = {(variant.spec.name, variant.spec.version) for variant in settings}
        self.marks = {
            model: kept
            for model, marks in self.marks.items()
            if (kept := {version: mark for version, mark in marks.items() if (model, version) in versions})
        }
        self._changed.set()

    def hold(self, models: Sequence[ModelSpec], everything: bool = False) -> None:
        """Leave the running replicas of these models unchanged, and publish the models under the names in `models`.

        `everything`: also hold every running model that is not wanted.
        """
        self._held = {spec.name: spec for spec in models}
        self._hold_all = everything
        self._changed.set()

    def wake(self) -> None:
        """Begin the next pass at once."""
        self._changed.set()

    def entries(self) -> Sequence[CatalogEntry]:
        """Return the catalog as last published."""
        return tuple(self._entries.values())

    async def run(self) -> None:
        """Run passes until cancelled."""
        while True:
            self._changed.clear()
            try:
                await self.step()
                if self._away:
                    log.info("ray.back")
                self._away = ""
            except RayAway as error:
                self._record_ray_away(str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PERIOD_S):  # wait_for (3.11) loses a cancellation that comes with the event
                    await self._changed.wait()

    async def step(self) -> None:
        """Run one pass. Raises RayAway."""
        snapshot = await self.backend.observe()
        fleet = self.gateways.fleet()
        self._roll_back_bad_canaries()
        parts = {model: self._shares(variants) for model, variants in self._wanted.items()}
        self._run_scaler(snapshot, fleet, parts)
        wanted = [
            app
            for model, variants in self._wanted.items()
            for app in self._wanted_apps(variants, parts[model], snapshot, fleet)
        ]
        held = self._held_models(snapshot)
        plan = reconcile.reconcile(
            wanted,
            {app: seen for app, seen in snapshot.apps.items() if seen.model not in held},
            self.wall_s(),
            empty=self._empty_apps(snapshot, fleet),
            frozen=self._frozen_models(),
            dropped={(model, part.version) for model, shares in parts.items() for part in shares if part.gone},
        )
        self._update_retired(plan.retired)
        self._publish(snapshot, fleet, wanted, parts, plan, held)
        away = None
        for action in plan.actions:
            log.info("step", step=type(action).__name__, app=action.app, why=getattr(action, "why", ""))
            try:
                await self._execute(action, {app.app: app.replicas for app in wanted})
            except RayAway as error:  # the other Ray clusters may answer
                away = error
        if away is not None:
            raise away

    async def _execute(self, action: reconcile.Action, replicas: Mapping[str, int]) -> None:
        match action:
            case reconcile.Deploy(app):
                settings = next(
                    variant for variants in self._wanted.values() for variant in variants if variant.app == app
                )
                await self.backend.deploy(replace(settings, replicas=replicas[app]))
            case reconcile.Scale(app, count):
                await self.backend.scale(app, count)
            case reconcile.Delete(app):
                await self.backend.delete(app)

    def _run_scaler(
        self, snapshot: RaySnapshot, fleet: Sequence[FleetWorker], parts: Mapping[str, Sequence[ReplicaShare]]
    ) -> None:
        """Let the scaler decide the number of replicas of each model.

        Retired applications are left out. Each target that is passed to the scaler is the number for which the scaler
        has asked: a canary's replicas beyond the canary's share of the calls are not counted, and neither are
        replacements that are not up yet.
        """
        staying = [seen for app, seen in snapshot.apps.items() if app not in self._retired_since_s]
        on_ray = scaling.on_ray(staying)
        room: dict[tuple[str, str], int] = {}
        for model, variants in self._wanted.items():
            versions = {part.version for part in parts[model] if not part.gone}
            apps = [snapshot.apps.get(variant.app) for variant in variants if variant.spec.version in versions]
            targets: dict[str, int] = {}
            for seen in apps:
                if seen is not None:
                    targets[seen.gpu] = targets.get(seen.gpu, 0) + seen.target
            if targets:
                for kind in [kind for kind in on_ray if kind[0] == model]:
                    target = total_for(targets.get(kind[1], 0), parts[model])
                    on_ray[kind] = replace(on_ray[kind], target=target)
            stable = _stable_variants(variants)
            if len(stable) > 1:
                room |= {(model, variant.spec.gpu): self._capacity(variant, snapshot) for variant in stable}
        decisions = self.scaler.run_pass(
            [variant.spec for variants in self._wanted.values() for variant in _stable_variants(variants)],
            on_ray,
            scaling.workers_of(fleet, {seen.digest: seen.gpu for seen in snapshot.apps.values()}),
            self.now(),
            self.wall_s(),
            blind=not self.gateways.linked,
            room=room,
        )
        scaling.log_decisions(decisions)
        self.on_scaling_pass()

    # ---- versions

    def _shares(self, variants: Sequence[ReplicaSettings]) -> tuple[ReplicaShare, ...]:
        """Return the versions of a model, each with a share of the model's calls."""
        stable = variants[0]
        canary = next((variant for variant in variants if variant.spec.version != stable.spec.version), None)
        return shares(
            (stable.spec.version, stable.digest),
            None if canary is None else (canary.spec.version, canary.digest, canary.spec.weight),
            self.marks.get(stable.spec.name, {}),
        )

    def _wanted_apps(
        self,
        variants: Sequence[ReplicaSettings],
        parts: Sequence[ReplicaShare],
        snapshot: RaySnapshot,
        fleet: Sequence[FleetWorker],
    ) -> Iterator[reconcile.Wanted]:
        """Yield the wanted applications of a model, each with a number of replicas. Versions that were rolled back are
        left out.

        On every GPU type in use, each version gets a share of the replicas, so that versions are compared on equal
        hardware.
        """
        for part in parts:
            if part.gone:
                continue
            choices = [variant for variant in variants if variant.spec.version == part.version]
            for variant in choices:
                replicas = replicas_of(self.scaler.replicas(variant.spec), parts)[part.version]
                if replicas or variant is choices[0] or variant.app in snapshot.apps:
                    yield reconcile.Wanted(
                        model=variant.spec.name,
                        digest=variant.digest,
                        replicas=replicas,
                        version=variant.spec.version,
                        ray=variant.ray_cluster,
                        stale=_has_other_weights(variant, fleet),
                        gpu=variant.spec.gpu,
                    )

    def _capacity(self, settings: ReplicaSettings, snapshot: RaySnapshot) -> int:
        """Return how many replicas with these settings fit on nodes of the settings' GPU type beside the replicas of
        other models."""
        nodes = snapshot.nodes_of(settings.ray_cluster)
        others = [
            (variant.spec, seen.running + seen.placed)
            for model, variants in self._wanted.items()
            for variant in variants
            if model != settings.spec.name and variant.ray_cluster == settings.ray_cluster
            if (seen := snapshot.apps.get(variant.app)) is not None
        ]
        return capacity(settings.spec, nodes, others)

    def _roll_back_bad_canaries(self) -> None:
        """Roll back each canary whose error rate or time to first token is too far above that of the stable version."""
        tallies: dict[str, CanaryTally] = {}
        for counted in self.gateways.tallies():
            tally = CanaryTally(counted.calls, counted.errors, counted.pairs, counted.slower)
            tallies[counted.generation] = tallies.get(counted.generation, CanaryTally()) + tally
        frozen = self._frozen_models()
        for model, variants in self._wanted.items():
            parts = self._shares(variants)
            if len(parts) == 1 or parts[1].gone or model in frozen:
                continue
            stable = [variant for variant in variants if variant.spec.version == parts[0].version]
            canary = [variant for variant in variants if variant.spec.version == parts[1].version]
            verdict = judge(
                sum((tallies.get(variant.digest, CanaryTally()) for variant in stable), CanaryTally()),
                sum((tallies.get(variant.digest, CanaryTally()) for variant in canary), CanaryTally()),
                error_ratio=canary[0].spec.error_ratio,
                ttft_ratio=canary[0].spec.ttft_ratio,
            )
            if verdict.roll_back:
                log.warning("version.rolled_back", model=model, version=parts[1].version, why=verdict.why)
                self.mark(model, parts[1].version, gone=f"rolled back by itself: {verdict.why}")

    def mark(self, model: str, version: str, **fields: Any) -> None:
        """Override the configuration of a version until the entry of the version changes. Raises KeyError for unknown
        names."""
        variants = self._wanted[model]
        digest = next((variant.digest for variant in variants if variant.spec.version == version), None)
        if digest is None:
            raise KeyError(version)
        marks = self.marks.setdefault(model, {})
        old = marks.get(version)
        marks[version] = replace(old if old is not None and old.digest == digest else VersionOverride(digest), **fields)
        self.on_mark()
        self._changed.set()

    def preview(self, model: str) -> CatalogEntry:
        """Return a model's last published entry with the current shares. Raises KeyError for an unknown model."""
        variants = self._wanted[model]
        parts = {part.version: part for part in self._shares(variants)}
        last = self._entries.get(model) or lifecycle.entry(variants[0].spec, ModelState.DECLARED, None)
        before = {share.version: share for share in last.versions}
        versions = tuple(
            replace(
                before.get(version) or VersionShare(version),
                weight=part.weight,
                quarantined=part.quarantined,
                state_reason=part.gone or ("quarantined" if part.quarantined else ""),
            )
            for version, part in parts.items()
        )
        return replace(last, versions=versions)

    # ---- publishing

    def _frozen_models(self) -> frozenset[str]:
        """Return the models that operators have frozen. No change of a frozen model is rolled out."""
        requests = self.scaler.operator_requests
        return frozenset(self._wanted) if requests.all_frozen else requests.frozen

    def _empty_apps(self, snapshot: RaySnapshot, fleet: Sequence[FleetWorker]) -> frozenset[str]:
        """Return the retired applications that may be deleted: applications without calls, and applications whose drain
        time is over."""
        now_s = self.wall_s()
        running: dict[str, int] = {}
        for worker in fleet:
            running[worker.generation] = running.get(worker.generation, 0) + worker.running
        waited_for = {
            demand.model for demand in self.gateways.demand() if demand.waiting and demand.model not in self._wanted
        }
        empty = set()
        for app, since_s in self._retired_since_s.items():
            seen = snapshot.apps.get(app)
            quiet = self.gateways.linked and now_s - since_s >= QUIET_S
            idle = seen is not None and not running.get(seen.digest, 0) and seen.model not in waited_for
            if (quiet and idle) or now_s - since_s >= self.drain_timeout_s:
                empty.add(app)
        return frozenset(empty)

    def _update_retired(self, retired: Collection[str]) -> None:
        now_s = self.wall_s()
        self._retired_since_s = {app: self._retired_since_s.get(app, now_s) for app in retired}

    def _publish(
        self,
        snapshot: RaySnapshot,
        fleet: Sequence[FleetWorker],
        wanted: Sequence[reconcile.Wanted],
        parts: Mapping[str, Sequence[ReplicaShare]],
        plan: reconcile.Plan,
        held: Mapping[str, ModelSpec],
    ) -> None:
        on_ray = {seen.model for seen in snapshot.apps.values()} - held.keys()
        leaving = {name: self._leaving.get(name) or ModelSpec(name, "") for name in on_ray if name not in self._wanted}
        self._leaving = leaving
        entries: dict[str, CatalogEntry] = {}
        for model, variants in self._wanted.items():
            entries[model] = self._entry(model, variants, snapshot, fleet, wanted, parts[model], plan.retired)
        for model, spec in leaving.items():
            share = (ReplicaShare(spec.version, 0.0),)
            entries[model] = self._entry(model, (), snapshot, fleet, (), share, plan.retired, spec)
        for model, spec in held.items():
            apps = [seen for seen in snapshot.apps.values() if seen.model == model]
            entries[model] = held_entry(spec, apps, [_reported(worker) for worker in fleet if worker.model == model])
        published = {(name, share.version) for name, entry in entries.items() for share in entry.versions}
        self._states = {key: state for key, state in self._states.items() if key in published}
        self._entries = {
            name: lifecycle.fill_from_earlier(self._entries.get(name), entry) for name, entry in entries.items()
        }
        self._entries = {
            name: replace(
                self.scaler.with_scaling_fields(entry), replicas_desired=entry.replicas_desired
            )  # counts the replicas of all versions
            for name, entry in self._entries.items()
        }
        self.gateways.publish(self.entries())

    def _held_models(self, snapshot: RaySnapshot) -> Mapping[str, ModelSpec]:
        """Return the specs of the models that must stay unchanged, by name. Models without a replica are included."""
        on_ray = {seen.model for seen in snapshot.apps.values()} if self._hold_all else set()
        names = (self._held.keys() | on_ray) - self._wanted.keys()
        return {name: self._held.get(name) or ModelSpec(name, "") for name in names}

    def _entry(
        self,
        model: str,
        variants: Sequence[ReplicaSettings],
        snapshot: RaySnapshot,
        fleet: Sequence[FleetWorker],
        wanted: Sequence[reconcile.Wanted],
        parts: Sequence[ReplicaShare],
        retired: Collection[str],
        leaving: ModelSpec | None = None,
    ) -> CatalogEntry:
        versions = []
        gone = [seen for seen in snapshot.apps.values() if seen.model == model and seen.app in retired]
        for part in parts:
            own = [variant for variant in variants if variant.spec.version == part.version]
            spec = own[0].spec if leaving is None else leaving
            apps = [app for app in wanted if app.model == model and app.version == part.version]
            current = [snapshot.apps[app.app] for app in apps if app.app in snapshot.apps]
            before = [
                seen
                for seen in snapshot.apps.values()
                if seen.model == model
                and (seen.version in (part.version, "") or leaving)
                and seen not in (*current, *gone)
            ]
            seen = lifecycle.merge_applications(current, before if leaving is None else [*before, *gone])
            versions.append(
                self._version(
                    part,
                    spec,
                    seen,
                    [worker for worker in fleet if worker.model == model and worker.version in (part.version, "")],
                    self.known.get(own[0].app) if own else None,
                    _unplaceable(own, snapshot),
                    sum(app.replicas for app in apps),
                    lost=self._engine_ends(model, part.version, [variant.digest for variant in own]),
                    wanted=leaving is None and not part.gone,
                    changing=bool(before) and any(not seen.running for seen in current),
                )
            )
        first = versions[0]
        return lifecycle.entry_of(
            versions,
            retired=[seen.digest for seen in gone if leaving is None],  # a leaving model still serves its waiting calls
            cold_start_s=self._cold_starts_s.get(first.spec.name, 0.0),
        )

    def _version(
        self,
        part: ReplicaShare,
        spec: ModelSpec,
        seen: Observed | None,
        workers: Sequence[FleetWorker],
        known: SourceFacts | None,
        unplaceable: str,
        desired: int,
        *,
        lost: str,
        wanted: bool,
        changing: bool,
    ) -> lifecycle.Version:
        sight = lifecycle.observe(wanted, seen, unplaceable)
        if sight is lifecycle.ModelObservation.SERVING and not workers and self.gateways.linked:
            sight = lifecycle.ModelObservation.STARTING  # replicas run, but no gateway is linked to one yet
        key = (spec.name, part.version)
        before = self._states.get(key, ModelState.DECLARED)
        state = lifecycle.next_state(ModelState.DECLARED if before is ModelState.GONE else before, sight)
        self._states[key] = state
        if state is not before:
            why = part.gone or (seen.trouble if seen else "")
            log.info("model.state", model=spec.name, version=part.version, state=state.value, why=why)
            if state is ModelState.READY and before is ModelState.LOADING and seen is not None:
                self._cold_starts_s.setdefault(spec.name, round(self.wall_s() - seen.deployed_at_s, 1))
        return lifecycle.Version(
            spec,
            part,
            state,
            seen,
            [_reported(worker) for worker in workers],
            known,
            unplaceable if state is ModelState.FAILED else "",
            desired,
            changing,
            lost,
        )

    def _engine_ends(self, model: str, version: str, generations: Sequence[str]) -> str:
        """Return a summary of the engines of a version that ended recently, as reported by the version's workers."""
        return lifecycle.summarize_ends(
            [
                (engine.at_s, engine.reason)
                for engine in self.gateways.lost()
                if engine.model == model and engine.version in (version, "") and engine.generation in (*generations, "")
            ]
        )

    def _record_ray_away(self, reason: str) -> None:
        if reason != self._away:
            log.warning("ray.away", reason=reason)
        self._away = reason
        if not self._entries:
            for name, variants in self._wanted.items():
                self._entries[name] = lifecycle.entry(
                    variants[0].spec, ModelState.DECLARED, None, known=SourceFacts(trouble=reason)
                )
            self.gateways.publish(self.entries())


def _stable_variants(variants: Sequence[ReplicaSettings]) -> Sequence[ReplicaSettings]:
    """Return the stable version's variants, one for each GPU type, the preferred type first."""
    return [variant for variant in variants if variant.spec.version == variants[0].spec.version]


def _has_other_weights(settings: ReplicaSettings, fleet: Sequence[FleetWorker]) -> bool:
    """Return whether the linked workers with these settings run weights other than the weights that the settings
    pin."""
    digests = {worker.weight_digest for worker in fleet if worker.generation == settings.digest}
    return bool(settings.spec.digest and digests) and settings.spec.digest not in digests


def _unplaceable(variants: Sequence[ReplicaSettings], snapshot: RaySnapshot) -> str:
    """Return why the first variant cannot be placed, or "" if at least one variant can be placed."""
    reasons = [why_unplaceable(variant.spec, snapshot.nodes_of(variant.ray_cluster)) for variant in variants]
    return reasons[0] if reasons and all(reasons) else ""


def _reported(worker: FleetWorker) -> WorkerReport:
    return WorkerReport(
        weight_digest=worker.weight_digest,
        bundle_digest=worker.bundle_digest,
        max_model_len=worker.max_model_len,
        engine_class=worker.engine_class,
        default_sampling=worker.default_sampling,
    )
