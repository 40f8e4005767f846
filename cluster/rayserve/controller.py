"""The loop: look at Ray, compare with the configuration, do the next steps, tell the gateways. Every second.

It remembers nothing that it could not see again: after a restart, or after Ray was away, the first look decides.
While Ray is away the last catalog stays published, so what serves goes on serving.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import structlog

from cluster.api.bundle import Bundle
from cluster.api.types import CatalogEntry, ModelSpec, ModelState
from cluster.config import Config
from cluster.config_gateway import Tls
from cluster.control import catalog, reconcile
from cluster.control.catalog import Known, Reported
from cluster.control.scaler import Scaler
from cluster.control.scaling_desk import Desk
from cluster.link.controller import ControllerEnd, FleetWorker
from cluster.link.scaling_verbs import scaling_verbs
from cluster.link.tls import TlsFiles
from cluster.observe.metrics import Metrics
from cluster.rayserve import bundling, scaling
from cluster.rayserve.backend import Backend, ChildBackend, RayAway, Snapshot
from cluster.rayserve.jobs import JobBackend
from cluster.rayserve.placement import why_unplaceable
from cluster.rayserve.settings import ReplicaSettings

log = structlog.get_logger("controller")

PERIOD_S = 1.0
END_SERVE_S = 6.0
LOCAL_DRAIN_S = 2.0


class Gateways(Protocol):
    """What the loop needs of the link (link.controller.ControllerEnd)."""

    def publish(self, entries: Sequence[CatalogEntry]) -> None:
        """Tell every gateway."""

    def fleet(self) -> Sequence[FleetWorker]:
        """Workers that some gateway has a link to."""

    @property
    def linked(self) -> int:
        """Gateways linked to now."""


@dataclass(eq=False, slots=True, repr=False)
class Controller:
    """`want` sets what is wanted, `step` is one pass, `run` is a pass every second or when `want` is called."""

    backend: Backend
    gateways: Gateways
    wall_s: Callable[[], float] = time.time
    known: dict[str, Known] = field(default_factory=dict)
    scaler: Scaler = field(default_factory=Scaler)
    now: Callable[[], float] = time.monotonic
    on_look: Callable[[], None] = lambda: None
    """Called after each look of the scaler."""
    _wanted: dict[str, ReplicaSettings] = field(default_factory=dict)
    _states: dict[str, ModelState] = field(default_factory=dict)
    _entries: dict[str, CatalogEntry] = field(default_factory=dict)
    _leaving: dict[str, ModelSpec] = field(default_factory=dict)
    _cold_starts_s: dict[str, float] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _away: str = ""

    def __repr__(self) -> str:
        states = ", ".join(f"{name} {state.value}" for name, state in self._states.items())
        return f"Controller({states or 'nothing seen'}{f'; Ray is away: {self._away}' if self._away else ''})"

    def want(self, settings: Sequence[ReplicaSettings]) -> None:
        """What is to run from now on; the next pass begins at once."""
        wanted = {s.spec.name: s for s in settings}
        self._leaving |= {name: s.spec for name, s in self._wanted.items() if name not in wanted}
        self._wanted = wanted
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
                await asyncio.wait_for(self._changed.wait(), PERIOD_S)

    async def step(self) -> None:
        """One pass. Raises RayAway."""
        snapshot = await self.backend.observe()
        self._look(snapshot)
        self._tell(snapshot)
        wanted = [reconcile.Wanted(name, s.digest, self._replicas(s.spec)) for name, s in self._wanted.items()]
        for action in reconcile.reconcile(wanted, snapshot.apps, self.wall_s()):
            log.info("step", step=type(action).__name__, model=action.model, why=getattr(action, "why", ""))
            await self._do(action)

    def _look(self, snapshot: Snapshot) -> None:
        """Let the scaler see, and decide."""
        decided = self.scaler.look(
            [s.spec for s in self._wanted.values()],
            scaling.on_ray(snapshot.apps.values()),
            scaling.workers_of(self.gateways.fleet()),
            self.now(),
            self.wall_s(),
            blind=not self.gateways.linked,
        )
        scaling.tell(decided)
        self.on_look()

    def _replicas(self, spec: ModelSpec) -> int:
        """Of all versions together."""
        return self.scaler.replicas(spec)

    async def _do(self, action: reconcile.Action) -> None:
        match action:
            case reconcile.Deploy(model):
                settings = self._wanted[model]
                await self.backend.deploy(replace(settings, replicas=self._replicas(settings.spec)))
            case reconcile.Scale(model, replicas):
                await self.backend.scale(model, replicas)
            case reconcile.Delete(model):
                await self.backend.delete(model)

    def _tell(self, snapshot: Snapshot) -> None:
        reported: dict[str, list[Reported]] = {}
        for worker in self.gateways.fleet():
            reported.setdefault(worker.model, []).append(_reported(worker))
        leaving = {name: spec for name, spec in self._leaving.items() if name not in self._wanted}
        self._leaving = {name: spec for name, spec in leaving.items() if name in snapshot.apps}
        specs = {name: s.spec for name, s in self._wanted.items()} | self._leaving
        now = {name: self._entry(spec, snapshot, reported.get(name, ())) for name, spec in specs.items()}
        self._states = {name: entry.state for name, entry in now.items()}
        self._entries = {name: catalog.remember(self._entries.get(name), entry) for name, entry in now.items()}
        self._entries = {name: self.scaler.told(entry) for name, entry in self._entries.items()}
        self.gateways.publish(self.entries())

    def _entry(self, spec: ModelSpec, snapshot: Snapshot, reported: Sequence[Reported]) -> CatalogEntry:
        seen = snapshot.apps.get(spec.name)
        unplaceable = why_unplaceable(spec, snapshot.nodes)
        sight = catalog.sight(spec.name in self._wanted, seen, unplaceable)
        if sight is catalog.Sight.SERVING and not reported and self.gateways.linked:
            sight = catalog.Sight.STARTING  # it runs, but no gateway has its link yet
        before = self._states.get(spec.name, ModelState.DECLARED)
        state = catalog.move(before, sight)
        if state is not before:
            log.info("model.state", model=spec.name, state=state.value, why=seen.trouble if seen else "")
            if state is ModelState.READY and before is ModelState.LOADING and seen is not None:
                self._cold_starts_s.setdefault(spec.name, round(self.wall_s() - seen.deployed_at_s, 1))
        return catalog.entry(
            spec,
            state,
            seen,
            reported=reported,
            known=self.known.get(spec.name),
            unplaceable=unplaceable if state is ModelState.FAILED else "",
            cold_start_s=self._cold_starts_s.get(spec.name, 0.0),
        )

    def _without_ray(self, reason: str) -> None:
        if reason != self._away:
            log.warning("ray.away", reason=reason)
        self._away = reason
        if not self._entries:
            for name, settings in self._wanted.items():
                self._entries[name] = catalog.entry(
                    settings.spec, ModelState.DECLARED, None, known=Known(trouble=reason)
                )
            self.gateways.publish(self.entries())


def _reported(worker: FleetWorker) -> Reported:
    return Reported(
        weight_digest=worker.weight_digest,
        bundle_digest=worker.bundle_digest,
        max_model_len=worker.max_model_len,
        engine_class=worker.engine_class,
        default_sampling=worker.default_sampling,
    )


def settings_of(config: Config, *, gateways: Sequence[str], local: bool) -> list[ReplicaSettings]:
    """What each model's replicas are started with."""
    weights = config.weights
    token_file = weights.hugging_face.token_file
    return [
        ReplicaSettings(
            spec=model.spec(),
            cluster=config.name,
            gateways=tuple(gateways),
            ray_cluster="local" if local else config.ray[0].name,
            tls=link_tls(config, local=local),
            cache_dir=str(weights.cache_dir) if weights.cache_dir else "",
            hugging_face_endpoint=weights.hugging_face.endpoint,
            hugging_face_token_file=str(token_file) if token_file else "",
            allowed_sources=weights.allow.sources,
            allowed_formats=weights.allow.formats,
            allow_remote_code=weights.allow.remote_code,
            drain_timeout_s=LOCAL_DRAIN_S if local else config.gateway.drain_timeout_s,
        )
        for model in config.models
    ]


def link_tls(config: Config, *, local: bool) -> TlsFiles | None:
    """The certificate that workers and controller show: link.tls, on one host else the gateway's own."""
    files: Tls | None = config.link.tls or (config.gateway.link_tls if local else None)
    return TlsFiles(files.cert_file, files.key_file, files.ca_file) if files else None


def _backend(config: Config, instance: str, ray_address: str | None, run_folder: Path) -> Backend:
    if ray_address is not None:
        run_folder.mkdir(parents=True, exist_ok=True)
        tag = {"HEADRACE_INSTANCE": instance}
        return ChildBackend(config.name, ray_address, tag, run_folder / "driver.log")
    if len(config.ray) != 1:
        raise ValueError(f"ray: this release drives one Ray cluster, and there are {len(config.ray)}; keep one entry")
    return JobBackend(config.name, config.ray[0].dashboard_url, config.ray[0].token_file)


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
) -> None:
    """Run until `stop`. `ray_address` is the local Ray's (its token in this environment), None for `config.ray`.

    `gateways` are the link addresses that controller and workers dial. `end_serve`: Serve, and so every replica, ends
    with the controller, which is for a Ray of our own; else replicas go on without it.
    """
    local = ray_address is not None
    backend = _backend(config, instance, ray_address, run_folder)
    bundles: dict[str, Bundle] = {}
    end = ControllerEnd(
        controller_id=f"{config.name}-{instance}",
        gateways=gateways,
        tls=link_tls(config, local=local),
        bundles=bundles.get,
    )
    asked = scaling.AskedFile(run_folder / "scaling.json")
    scaler = Scaler(scaling.settings_of(config), time.monotonic(), asked.read())
    controller = Controller(backend, end, scaler=scaler)
    if metrics is not None:
        counters = scaling.Counters(metrics)
        controller.on_look = lambda: counters.count(scaler)
    scaling.listen(end, scaler, controller.now, controller.wake)

    def changed() -> None:
        asked.keep(scaler.asked)
        controller.wake()

    end.verbs |= scaling_verbs(Desk(scaler, changed))
    wanted = settings_of(config, gateways=gateways, local=local)
    controller.want(wanted)
    parts = [
        asyncio.create_task(end.run()),
        asyncio.create_task(controller.run()),
        asyncio.create_task(_build_bundles(wanted, run_folder / "bundles", bundles, controller.known, local=local)),
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
                await asyncio.wait_for(backend.shutdown(), END_SERVE_S)
        await backend.close()


async def _first_end(until: asyncio.Task[bool], parts: Sequence[asyncio.Task[None]]) -> None:
    """Wait for `until`; a part that fails before is raised. Parts may end."""
    pending: set[asyncio.Task[None] | asyncio.Task[bool]] = {until, *parts}
    while not until.done():
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for part in done:
            part.result()


async def _build_bundles(
    wanted: Sequence[ReplicaSettings],
    folder: Path,
    bundles: dict[str, Bundle],
    known: dict[str, Known],
    *,
    local: bool,
) -> None:
    """Bundles of the models whose source this host has, one after another, so that they are tokenizable at rest."""
    here = [s for s in wanted if local or Path(s.spec.source).is_dir()]  # noqa: ASYNC240 - once, at the start
    for settings in here:
        bundle, about = await bundling.build(settings, folder)
        known[settings.spec.name] = about
        if bundle is not None:
            bundles[bundle.digest] = bundle
        else:
            log.warning("bundle.not_built", model=settings.spec.name, why=about.trouble)


__all__ = ["Controller", "run_controller", "settings_of"]
