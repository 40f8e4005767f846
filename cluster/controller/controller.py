"""The loop: look at Ray, compare with the configuration, do the next steps, tell the gateways. Every second.

It remembers nothing that it could not see again: after a restart, or after Ray was away, the first look decides.
While Ray is away the last catalog stays published, so what serves goes on serving.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import structlog

from cluster.api.demand import ModelDemand
from cluster.api.types import CatalogEntry, ModelSpec, ModelState, VersionShare, VersionTally
from cluster.config.gateway import Tls
from cluster.config.lenient import Lenient
from cluster.config.schema import Config
from cluster.controller import bundling, scaling
from cluster.controller import catalog_service as catalog_desk
from cluster.controller.catalog_verbs import catalog_verbs
from cluster.controller.last_good import held_names, with_last_good
from cluster.controller.links import ControllerLinks, FleetWorker
from cluster.controller.scaling_verbs import scaling_verbs
from cluster.observe.metrics import Metrics
from cluster.policy.catalog import lifecycle, reconcile
from cluster.policy.catalog.canary import CanaryTally, judge
from cluster.policy.catalog.held import held_entry
from cluster.policy.catalog.lifecycle import Known, Reported
from cluster.policy.catalog.placement import capacity, why_unplaceable
from cluster.policy.catalog.reconcile import Observed
from cluster.policy.catalog.versions import ReplicaShare, VersionMark, replicas_of, shares, total_of
from cluster.policy.scaling.operator_requests import ScalingRequests
from cluster.policy.scaling.scaler import Scaler
from cluster.process.private_files import make_private_folder
from cluster.ray.backend import Backend, ChildBackend, RayAway, RaySnapshot
from cluster.ray.jobs import JobBackend
from cluster.ray.several_clusters import SeveralRays
from cluster.wire.bundle import Bundle
from cluster.wire.lost_engines import LostEngine
from cluster.wire.tls import TlsFiles
from cluster.worker.settings import ReplicaSettings

log = structlog.get_logger("controller")

PERIOD_S = 1.0
END_SERVE_S = 6.0
QUIET_S = 3.0
"""How long an application must have had no new call before it counts as empty: until gateways have said so."""
LOCAL_DRAIN_S = 2.0


class GatewayPort(Protocol):
    """What the loop needs of the link (link.controller.ControllerLinks)."""

    def publish(self, entries: Sequence[CatalogEntry]) -> None:
        """Tell every gateway."""

    def fleet(self) -> Sequence[FleetWorker]:
        """Workers that some gateway has a link to."""

    def lost(self) -> Sequence[LostEngine]:
        """Engines that ended in the last minutes, the oldest first."""

    def demand(self) -> Sequence[ModelDemand]:
        """By model, summed over gateways."""

    def tallies(self) -> Sequence[VersionTally]:
        """What gateways have counted of versions on trial."""

    @property
    def linked(self) -> int:
        """Gateways linked to now."""


@dataclass(eq=False, slots=True, repr=False)
class Controller:
    """`want` sets what is wanted, `step` is one pass, `run` is a pass every second or when `want` is called."""

    backend: Backend
    gateways: GatewayPort
    wall_s: Callable[[], float] = time.time
    known: dict[str, Known] = field(default_factory=dict)
    """What sources say of models, by application."""
    drain_timeout_s: float = 300.0
    """How long calls may stay at an application that gets no new ones; then it is ended, and they move or are cut."""
    marks: dict[str, dict[str, VersionMark]] = field(default_factory=dict)
    """What operators and trials have set aside of the configuration, by model and version."""
    on_mark: Callable[[], None] = lambda: None
    """Called when `marks` have changed."""
    scaler: Scaler = field(default_factory=Scaler)
    now: Callable[[], float] = time.monotonic
    on_look: Callable[[], None] = lambda: None
    """Called after each look of the scaler."""
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
        return f"Controller({states or 'nothing seen'}{f'; Ray is away: {self._away}' if self._away else ''})"

    def want(self, settings: Sequence[ReplicaSettings]) -> None:
        """What is to run from now on; the next pass begins at once. Several of one model are its versions and the types
        of GPU that it may run on, the one that stays and the first choice first."""
        wanted: dict[str, tuple[ReplicaSettings, ...]] = {}
        for one in settings:
            wanted[one.spec.name] = (*wanted.get(one.spec.name, ()), one)
        self._leaving |= {name: them[0].spec for name, them in self._wanted.items() if name not in wanted}
        self._wanted = wanted
        versions = {(one.spec.name, one.spec.version) for one in settings}
        self.marks = {
            model: kept
            for model, marks in self.marks.items()
            if (kept := {version: mark for version, mark in marks.items() if (model, version) in versions})
        }
        self._changed.set()

    def hold(self, models: Sequence[ModelSpec], everything: bool = False) -> None:
        """Leave what runs of these models as it is, and tell it under these names; `everything`: of all models that are
        not wanted."""
        self._held = {one.name: one for one in models}
        self._hold_all = everything
        self._changed.set()

    def wake(self) -> None:
        """The next pass begins at once."""
        self._changed.set()

    def entries(self) -> Sequence[CatalogEntry]:
        """The catalog as last published."""
        return tuple(self._entries.values())

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._changed.clear()
            try:
                await self.step()
                if self._away:
                    log.info("ray.back")
                self._away = ""
            except RayAway as error:
                self._without_ray(str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PERIOD_S):  # wait_for (3.11) loses a cancellation that comes with the event
                    await self._changed.wait()

    async def step(self) -> None:
        """One pass. Raises RayAway."""
        snapshot = await self.backend.observe()
        fleet = self.gateways.fleet()
        self._judge()
        parts = {model: self._shares(them) for model, them in self._wanted.items()}
        self._look(snapshot, fleet, parts)
        wanted = [
            one for model, them in self._wanted.items() for one in self._counted(them, parts[model], snapshot, fleet)
        ]
        held = self._held_now(snapshot)
        plan = reconcile.reconcile(
            wanted,
            {app: seen for app, seen in snapshot.apps.items() if seen.model not in held},
            self.wall_s(),
            empty=self._empty(snapshot, fleet),
            frozen=self._frozen(),
            dropped={(model, part.version) for model, them in parts.items() for part in them if part.gone},
        )
        self._keep_retired(plan.retired)
        self._tell(snapshot, fleet, wanted, parts, plan, held)
        away = None
        for action in plan.actions:
            log.info("step", step=type(action).__name__, app=action.app, why=getattr(action, "why", ""))
            try:
                await self._do(action, {want.app: want.replicas for want in wanted})
            except RayAway as error:  # another Ray than this one's may be there
                away = error
        if away is not None:
            raise away

    async def _do(self, action: reconcile.Action, replicas: Mapping[str, int]) -> None:
        match action:
            case reconcile.Deploy(app):
                settings = next(one for them in self._wanted.values() for one in them if one.app == app)
                await self.backend.deploy(replace(settings, replicas=replicas[app]))
            case reconcile.Scale(app, count):
                await self.backend.scale(app, count)
            case reconcile.Delete(app):
                await self.backend.delete(app)

    def _look(
        self, snapshot: RaySnapshot, fleet: Sequence[FleetWorker], parts: Mapping[str, Sequence[ReplicaShare]]
    ) -> None:
        """Let the scaler see, and decide. What is about to go counts no more, and what a trial has beyond its part of
        the calls, or a replacement that is not up yet, was not asked for by the scaler."""
        stay = [seen for app, seen in snapshot.apps.items() if app not in self._retired_since_s]
        there = scaling.on_ray(stay)
        room: dict[tuple[str, str], int] = {}
        for model, them in self._wanted.items():
            runs = {part.version for part in parts[model] if not part.gone}
            apps = [snapshot.apps.get(one.app) for one in them if one.spec.version in runs]
            targets: dict[str, int] = {}
            for seen in apps:
                if seen is not None:
                    targets[seen.gpu] = targets.get(seen.gpu, 0) + seen.target
            if targets:
                for kind in [kind for kind in there if kind[0] == model]:
                    target = total_of(targets.get(kind[1], 0), parts[model])
                    there[kind] = replace(there[kind], target=target)
            choices = _choices(them)
            if len(choices) > 1:
                room |= {(model, one.spec.gpu): self._capacity(one, snapshot) for one in choices}
        decided = self.scaler.look(
            [one.spec for them in self._wanted.values() for one in _choices(them)],
            there,
            scaling.workers_of(fleet, {seen.digest: seen.gpu for seen in snapshot.apps.values()}),
            self.now(),
            self.wall_s(),
            blind=not self.gateways.linked,
            room=room,
        )
        scaling.tell(decided)
        self.on_look()

    # ---- versions

    def _shares(self, them: Sequence[ReplicaSettings]) -> tuple[ReplicaShare, ...]:
        """Which of a model's versions get calls, and which part."""
        stays = them[0]
        trial = next((one for one in them if one.spec.version != stays.spec.version), None)
        return shares(
            (stays.spec.version, stays.digest),
            None if trial is None else (trial.spec.version, trial.digest, trial.spec.weight),
            self.marks.get(stays.spec.name, {}),
        )

    def _counted(
        self,
        them: Sequence[ReplicaSettings],
        parts: Sequence[ReplicaShare],
        snapshot: RaySnapshot,
        fleet: Sequence[FleetWorker],
    ) -> Iterator[reconcile.Wanted]:
        """A model's applications with the number of their replicas; one of a version that is gone is not among them.
        Versions have their parts on every type of GPU that is in use, so that like is compared with like."""
        for part in parts:
            if part.gone:
                continue
            choices = [one for one in them if one.spec.version == part.version]
            for one in choices:
                replicas = replicas_of(self.scaler.replicas(one.spec), parts)[part.version]
                if replicas or one is choices[0] or one.app in snapshot.apps:
                    yield reconcile.Wanted(
                        model=one.spec.name,
                        digest=one.digest,
                        replicas=replicas,
                        version=one.spec.version,
                        ray=one.ray_cluster,
                        stale=_stale(one, fleet),
                        gpu=one.spec.gpu,
                    )

    def _capacity(self, settings: ReplicaSettings, snapshot: RaySnapshot) -> int:
        """How many replicas its type of GPU holds, beside those of other models."""
        nodes = snapshot.nodes_of(settings.ray_cluster)
        others = [
            (one.spec, seen.running + seen.placed)
            for model, them in self._wanted.items()
            for one in them
            if model != settings.spec.name and one.ray_cluster == settings.ray_cluster
            if (seen := snapshot.apps.get(one.app)) is not None
        ]
        return capacity(settings.spec, nodes, others)

    def _judge(self) -> None:
        """Take back trials that do too badly."""
        tallies: dict[str, CanaryTally] = {}
        for one in self.gateways.tallies():
            tally = CanaryTally(one.calls, one.errors, one.pairs, one.slower)
            tallies[one.generation] = tallies.get(one.generation, CanaryTally()) + tally
        frozen = self._frozen()
        for model, them in self._wanted.items():
            parts = self._shares(them)
            if len(parts) == 1 or parts[1].gone or model in frozen:
                continue
            stays = [one for one in them if one.spec.version == parts[0].version]
            trial = [one for one in them if one.spec.version == parts[1].version]
            verdict = judge(
                sum((tallies.get(one.digest, CanaryTally()) for one in stays), CanaryTally()),
                sum((tallies.get(one.digest, CanaryTally()) for one in trial), CanaryTally()),
                error_ratio=trial[0].spec.error_ratio,
                ttft_ratio=trial[0].spec.ttft_ratio,
            )
            if verdict.goes:
                log.warning("version.rolled_back", model=model, version=parts[1].version, why=verdict.why)
                self.mark(model, parts[1].version, gone=f"rolled back by itself: {verdict.why}")

    def mark(self, model: str, version: str, **fields: Any) -> None:
        """Set aside what the configuration says of a version, until that is changed. Raises KeyError."""
        them = self._wanted[model]
        digest = next((one.digest for one in them if one.spec.version == version), None)
        if digest is None:
            raise KeyError(version)
        marks = self.marks.setdefault(model, {})
        old = marks.get(version)
        marks[version] = replace(old if old is not None and old.digest == digest else VersionMark(digest), **fields)
        self.on_mark()
        self._changed.set()

    def preview(self, model: str) -> CatalogEntry:
        """A model as it will be told: what was told last, with the shares of now. Raises KeyError."""
        them = self._wanted[model]
        parts = {part.version: part for part in self._shares(them)}
        last = self._entries.get(model) or lifecycle.entry(them[0].spec, ModelState.DECLARED, None)
        before = {share.version: share for share in last.versions}
        told = tuple(
            replace(
                before.get(version) or VersionShare(version),
                weight=part.weight,
                quarantined=part.quarantined,
                state_reason=part.gone or ("quarantined" if part.quarantined else ""),
            )
            for version, part in parts.items()
        )
        return replace(last, versions=told)

    # ---- what is told

    def _frozen(self) -> frozenset[str]:
        """Models of which operators want nothing rolled out."""
        asked = self.scaler.asked
        return frozenset(self._wanted) if asked.all_frozen else asked.frozen

    def _empty(self, snapshot: RaySnapshot, fleet: Sequence[FleetWorker]) -> frozenset[str]:
        """Applications that have had no new call for a while, and have none left or had their time."""
        now_s = self.wall_s()
        running: dict[str, int] = {}
        for worker in fleet:
            running[worker.generation] = running.get(worker.generation, 0) + worker.running
        waited_for = {one.model for one in self.gateways.demand() if one.waiting and one.model not in self._wanted}
        found = set()
        for app, since_s in self._retired_since_s.items():
            seen = snapshot.apps.get(app)
            quiet = self.gateways.linked and now_s - since_s >= QUIET_S
            idle = seen is not None and not running.get(seen.digest, 0) and seen.model not in waited_for
            if (quiet and idle) or now_s - since_s >= self.drain_timeout_s:
                found.add(app)
        return frozenset(found)

    def _keep_retired(self, retired: Collection[str]) -> None:
        now_s = self.wall_s()
        self._retired_since_s = {app: self._retired_since_s.get(app, now_s) for app in retired}

    def _tell(
        self,
        snapshot: RaySnapshot,
        fleet: Sequence[FleetWorker],
        wanted: Sequence[reconcile.Wanted],
        parts: Mapping[str, Sequence[ReplicaShare]],
        plan: reconcile.Plan,
        held: Mapping[str, ModelSpec],
    ) -> None:
        there = {seen.model for seen in snapshot.apps.values()} - held.keys()
        leaving = {name: self._leaving.get(name) or ModelSpec(name, "") for name in there if name not in self._wanted}
        self._leaving = leaving
        now: dict[str, CatalogEntry] = {}
        for model, them in self._wanted.items():
            now[model] = self._entry(model, them, snapshot, fleet, wanted, parts[model], plan.retired)
        for model, spec in leaving.items():
            share = (ReplicaShare(spec.version, 0.0),)
            now[model] = self._entry(model, (), snapshot, fleet, (), share, plan.retired, spec)
        for model, spec in held.items():
            apps = [seen for seen in snapshot.apps.values() if seen.model == model]
            now[model] = held_entry(spec, apps, [_reported(one) for one in fleet if one.model == model])
        told = {(name, share.version) for name, entry in now.items() for share in entry.versions}
        self._states = {key: state for key, state in self._states.items() if key in told}
        self._entries = {name: lifecycle.remember(self._entries.get(name), entry) for name, entry in now.items()}
        self._entries = {
            name: replace(self.scaler.told(entry), replicas_desired=entry.replicas_desired)  # of all its versions
            for name, entry in self._entries.items()
        }
        self.gateways.publish(self.entries())

    def _held_now(self, snapshot: RaySnapshot) -> Mapping[str, ModelSpec]:
        """The models that are to stay as they are, those included that run nowhere."""
        there = {seen.model for seen in snapshot.apps.values()} if self._hold_all else set()
        names = (self._held.keys() | there) - self._wanted.keys()
        return {name: self._held.get(name) or ModelSpec(name, "") for name in names}

    def _entry(
        self,
        model: str,
        them: Sequence[ReplicaSettings],
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
            mine = [one for one in them if one.spec.version == part.version]
            spec = mine[0].spec if leaving is None else leaving
            apps = [want for want in wanted if want.model == model and want.version == part.version]
            now = [snapshot.apps[want.app] for want in apps if want.app in snapshot.apps]
            before = [
                seen
                for seen in snapshot.apps.values()
                if seen.model == model and (seen.version in (part.version, "") or leaving) and seen not in (*now, *gone)
            ]
            seen = lifecycle.combined(now, before if leaving is None else [*before, *gone])
            versions.append(
                self._version(
                    part,
                    spec,
                    seen,
                    [worker for worker in fleet if worker.model == model and worker.version in (part.version, "")],
                    self.known.get(mine[0].app) if mine else None,
                    _unplaceable(mine, snapshot),
                    sum(want.replicas for want in apps),
                    lost=self._ends(model, part.version, [one.digest for one in mine]),
                    wanted=leaving is None and not part.gone,
                    changing=bool(before) and any(not one.running for one in now),
                )
            )
        first = versions[0]
        return lifecycle.entry_of(
            versions,
            retired=[one.digest for one in gone if leaving is None],  # of what leaves, calls that wait get their turn
            cold_start_s=self._cold_starts_s.get(first.spec.name, 0.0),
        )

    def _version(
        self,
        part: ReplicaShare,
        spec: ModelSpec,
        seen: Observed | None,
        workers: Sequence[FleetWorker],
        known: Known | None,
        unplaceable: str,
        desired: int,
        *,
        lost: str,
        wanted: bool,
        changing: bool,
    ) -> lifecycle.Version:
        sight = lifecycle.sight(wanted, seen, unplaceable)
        if sight is lifecycle.Sight.SERVING and not workers and self.gateways.linked:
            sight = lifecycle.Sight.STARTING  # it runs, but no gateway has its link yet
        key = (spec.name, part.version)
        before = self._states.get(key, ModelState.DECLARED)
        state = lifecycle.move(ModelState.DECLARED if before is ModelState.GONE else before, sight)
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

    def _ends(self, model: str, version: str, generations: Sequence[str]) -> str:
        """What the version's workers said lately of the ends of their engines."""
        return lifecycle.ends_of(
            [
                (one.at_s, one.reason)
                for one in self.gateways.lost()
                if one.model == model and one.version in (version, "") and one.generation in (*generations, "")
            ]
        )

    def _without_ray(self, reason: str) -> None:
        if reason != self._away:
            log.warning("ray.away", reason=reason)
        self._away = reason
        if not self._entries:
            for name, them in self._wanted.items():
                self._entries[name] = lifecycle.entry(
                    them[0].spec, ModelState.DECLARED, None, known=Known(trouble=reason)
                )
            self.gateways.publish(self.entries())


def _choices(them: Sequence[ReplicaSettings]) -> Sequence[ReplicaSettings]:
    """The types of GPU of the version that stays, the first choice first."""
    return [one for one in them if one.spec.version == them[0].spec.version]


def _stale(settings: ReplicaSettings, fleet: Sequence[FleetWorker]) -> bool:
    """Whether its workers have other weights than the configuration pins by now."""
    have = {worker.weight_digest for worker in fleet if worker.generation == settings.digest}
    return bool(settings.spec.digest and have) and settings.spec.digest not in have


def _unplaceable(choices: Sequence[ReplicaSettings], snapshot: RaySnapshot) -> str:
    """Why none of them could run, the first one's reason; "" when one could."""
    reasons = [why_unplaceable(one.spec, snapshot.nodes_of(one.ray_cluster)) for one in choices]
    return reasons[0] if reasons and all(reasons) else ""


def _reported(worker: FleetWorker) -> Reported:
    return Reported(
        weight_digest=worker.weight_digest,
        bundle_digest=worker.bundle_digest,
        max_model_len=worker.max_model_len,
        engine_class=worker.engine_class,
        default_sampling=worker.default_sampling,
    )


def settings_of(config: Config, *, gateways: Sequence[str], local: bool) -> list[ReplicaSettings]:
    """What each model's replicas are started with, one for each version and type of GPU."""
    weights = config.weights
    token_file = weights.hugging_face.token_file
    return [
        ReplicaSettings(
            spec=spec,
            cluster=config.name,
            gateways=tuple(gateways),
            ray_cluster="local" if local else spec.ray or config.ray[0].name,
            tls=link_tls(config, local=local),
            cache_dir=str(weights.cache_dir) if weights.cache_dir else "",
            hugging_face_endpoint=weights.hugging_face.endpoint,
            hugging_face_token_file=str(token_file) if token_file else "",
            allowed_sources=weights.allow.sources,
            allowed_formats=weights.allow.formats,
            allowed_licenses=weights.allow.licenses,
            allow_remote_code=weights.allow.remote_code,
            drain_timeout_s=LOCAL_DRAIN_S if local else config.gateway.drain_timeout_s,
        )
        for model in config.models
        for spec in model.specs()
    ]


def link_tls(config: Config, *, local: bool) -> TlsFiles | None:
    """The certificate that workers and controller show: link.tls, on one host else the gateway's own."""
    files: Tls | None = config.link.tls or (config.gateway.link_tls if local else None)
    return TlsFiles(files.cert_file, files.key_file, files.ca_file) if files else None


def _backend(config: Config, instance: str, ray_address: str | None, run_folder: Path) -> Backend:
    if ray_address is not None:
        make_private_folder(run_folder)
        tag = {"HEADRACE_INSTANCE": instance}
        return ChildBackend(config.name, ray_address, tag, run_folder / "driver.log")
    if not config.ray:
        raise ValueError("ray: names no Ray cluster to run models on")
    return SeveralRays({one.name: JobBackend(config.name, one.dashboard_url, one.token_file) for one in config.ray})


async def run_controller(
    config: Config,
    *,
    instance: str,
    ray_address: str | None,
    gateways: Sequence[str],
    run_folder: Path,
    stop: asyncio.Event,
    end_serve: bool = False,
    metrics: Metrics | None = None,
    found: Lenient | None = None,
) -> None:
    """Run until `stop`. `ray_address` is the local Ray's (its token in this environment), None for `config.ray`.

    `gateways` are the link addresses that controller and workers dial. `end_serve`: Serve, and so every replica, ends
    with the controller, which is for a Ray of our own; else replicas go on without it. `found`: what was wrong in the
    file that `config` is from.
    """
    found = with_last_good(found or Lenient(config), run_folder)
    config = found.config
    local = ray_address is not None
    backend = _backend(config, instance, ray_address, run_folder)
    bundles: dict[str, Bundle] = {}
    end = ControllerLinks(
        controller_id=f"{config.name}-{instance}",
        gateways=gateways,
        tls=link_tls(config, local=local),
        bundles=bundles.get,
    )
    asked = scaling.AskedFile(run_folder / "scaling.json")
    scaler = Scaler(scaling.settings_of(config), time.monotonic(), asked.read())
    controller = Controller(backend, end, scaler=scaler, drain_timeout_s=config.gateway.drain_timeout_s)
    controller.hold([ModelSpec(one.name, "", one.aliases, fallback=one.fallback) for one in found.held], found.all_held)
    if metrics is not None:
        counters = scaling.Counters(metrics)
        controller.on_look = lambda: counters.count(scaler)
    scaling.listen(end, scaler, controller.now, controller.wake)

    def changed() -> None:
        asked.keep(scaler.asked)
        controller.wake()

    end.verbs |= scaling_verbs(ScalingRequests(scaler, changed))
    builder = Builder(run_folder / "bundles", bundles, controller.known, local=local)
    desk = catalog_desk.StoredCatalogService(
        config,
        controller,
        catalog_desk.KeptFile(run_folder / "catalog.json", instance if local else ""),
        lambda config: settings_of(config, gateways=gateways, local=local),
        by_file=not local,
        held=held_names(found.held),
        on_want=builder.want,
    )
    controller.on_mark = desk.keep
    end.verbs |= catalog_verbs(desk)
    parts = [
        asyncio.create_task(end.run()),
        asyncio.create_task(controller.run()),
        asyncio.create_task(builder.run()),
    ]
    until = asyncio.create_task(stop.wait())
    try:
        await _first_end(until, parts)
    finally:
        for part in (until, *parts):
            part.cancel()
        await asyncio.gather(until, *parts, return_exceptions=True)
        if end_serve:
            with contextlib.suppress(RayAway, TimeoutError):
                async with asyncio.timeout(END_SERVE_S):
                    await backend.shutdown()
        await backend.close()


async def _first_end(until: asyncio.Task[bool], parts: Sequence[asyncio.Task[None]]) -> None:
    """Wait for `until`; a part that fails before is raised. Parts may end."""
    pending: set[asyncio.Task[None] | asyncio.Task[bool]] = {until, *parts}
    while not until.done():
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for part in done:
            part.result()


class Builder:
    """Builds bundles of the models whose source this host has, one after another, so that they are tokenizable at
    rest."""

    def __init__(self, folder: Path, bundles: dict[str, Bundle], known: dict[str, Known], *, local: bool) -> None:
        """`bundles` by digest and `known` by application get what is built. `local`: replicas run on this host."""
        self._folder = folder
        self._bundles = bundles
        self._known = known
        self._local = local
        self._todo: asyncio.Queue[ReplicaSettings] = asyncio.Queue()

    def want(self, settings: Sequence[ReplicaSettings]) -> None:
        """Build those that are not yet."""
        for one in settings:
            self._todo.put_nowait(one)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            settings = await self._todo.get()
            here = self._local or await asyncio.to_thread(Path(settings.spec.source).is_dir)
            if not here or settings.app in self._known:
                continue
            bundle, about = await bundling.build(settings, self._folder)
            self._known[settings.app] = about
            if bundle is not None:
                self._bundles[bundle.digest] = bundle
            else:
                log.warning("bundle.not_built", model=settings.spec.name, why=about.trouble)


__all__ = ["Controller", "run_controller", "settings_of"]
