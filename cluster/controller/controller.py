"""The control loop: observe Ray, compare Ray's state with the configuration, take the next steps, publish the catalog.

A pass runs every second. All state of the loop can be restored from a new observation. After a restart or an outage of
Ray, the first observation is therefore enough to continue. While Ray is unreachable, the last catalog stays published
and the running replicas keep serving.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import structlog

from cluster.api.demand import ModelDemand
from cluster.api.types import CatalogEntry, VersionTally
from cluster.controller import scaling
from cluster.controller.desired_models import DesiredModels
from cluster.controller.links import FleetWorker
from cluster.controller.published_catalog import ControllerPass, PublishedCatalog
from cluster.controller.retired_apps import RetiredApps
from cluster.policy.catalog import reconcile
from cluster.policy.catalog.canary import CanaryTally, judge
from cluster.policy.catalog.versions import replicas_of
from cluster.policy.problems import Finding, Problem, ProblemList
from cluster.policy.scaling.scaler import Scaler
from cluster.ray.backend import Backend, RayAway, RaySnapshot
from cluster.ray.several_clusters import MultiClusterBackend
from cluster.wire.lost_engines import LostEngine
from cluster.worker.settings import ReplicaSettings

log = structlog.get_logger("controller")

PERIOD_S = 1.0
LOCAL_RAY = "local"
"""Name of the Ray that `headrace up` starts, in metrics and problems."""


class GatewayPort(Protocol):
    """The part of ControllerLinks (links.py) that the control loop uses."""

    def publish(self, entries: Sequence[CatalogEntry]) -> None:
        """Send the catalog to every gateway."""

    def set_problems(self, problems: Sequence[Problem]) -> None:
        """Send the faults that the controller sees to every gateway."""

    def unreachable_gateways(self, now: float) -> Sequence[tuple[str, str]]:
        """Return the gateways that have gone without a word or are frozen, each with the reason."""

    def fleet(self) -> Sequence[FleetWorker]:
        """Return the workers that are linked to at least one gateway."""

    def lost(self) -> Sequence[LostEngine]:
        """Return the engines that ended in the last few minutes, oldest first."""

    def demand(self) -> Sequence[ModelDemand]:
        """Return the demand by model, summed over gateways."""

    def tallies(self) -> Sequence[VersionTally]:
        """Return the call counts of each gateway: for canaries, and for the stable versions with which canaries are
        compared."""

    @property
    def linked(self) -> int:
        """Number of gateways that the controller is linked to."""


@dataclass(eq=False, slots=True, repr=False)
class Controller:
    """The control loop of one cluster: `step` runs one pass, and `run` runs a pass every second and after each change
    of the desired models."""

    backend: Backend
    gateways: GatewayPort
    models: DesiredModels = field(default_factory=DesiredModels)
    catalog: PublishedCatalog = field(default_factory=PublishedCatalog)
    retired: RetiredApps = field(default_factory=RetiredApps)
    scaler: Scaler = field(default_factory=Scaler)
    counters: scaling.Counters | None = None
    keep_overrides: Callable[[], None] = lambda: None
    """Function that stores the overrides of `models`. Called after an automatic rollback has changed the overrides."""
    wall_s: Callable[[], float] = time.time
    now: Callable[[], float] = time.monotonic
    ray_answers: bool | None = None
    """Whether at least one Ray cluster answered in the last pass; None before the first pass."""
    _away: str = ""
    _problems: ProblemList = field(default_factory=ProblemList)
    _short_of: Sequence[Finding] = ()
    """The models for whose replicas no node had room in the last pass."""

    def __repr__(self) -> str:
        return f"Controller({self.catalog}{f'; Ray is away: {self._away}' if self._away else ''})"

    async def run(self) -> None:
        """Run passes until cancelled."""
        while True:
            self.models.changed.clear()
            try:
                await self.step()
                if self._away:
                    log.info("ray.recovered")
                self._away = ""
                self.ray_answers = True
            except RayAway as error:
                self._record_ray_away(str(error))
            self.report_problems()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PERIOD_S):  # wait_for (3.11) loses a cancellation that comes with the event
                    await self.models.changed.wait()

    async def step(self) -> None:
        """Run one pass. Raises RayAway."""
        snapshot = await self.backend.observe()
        fleet = self.gateways.fleet()
        now_s, linked = self.wall_s(), bool(self.gateways.linked)
        self._roll_back_bad_canaries()
        self._run_scaler(snapshot, fleet)
        wanted = [app for model in self.models.variants for app in self._wanted_apps(model, snapshot, fleet)]
        self._short_of = [
            Finding(
                "no_capacity", app.model, f"it wants {app.replicas} replicas, and the nodes have room for {running}"
            )
            for app in wanted
            if app.replicas > (running := getattr(snapshot.apps.get(app.app), "running", 0)) and not app.has_room
        ]
        held = self.models.held({seen.model for seen in snapshot.apps.values()})
        awaited = {demand.model for demand in self.gateways.demand() if demand.waiting} - self.models.variants.keys()
        plan = reconcile.reconcile(
            wanted,
            {app: seen for app, seen in snapshot.apps.items() if seen.model not in held},
            now_s,
            empty=self.retired.deletable(snapshot, fleet, awaited, linked, now_s),
            frozen=self._frozen_models(),
            dropped={
                (model, part.version)
                for model in self.models.variants
                for part in self.models.shares(model)
                if part.gone
            },
        )
        self.retired.update(plan.retired, now_s)
        seen = ControllerPass(now_s, snapshot, fleet, self.gateways.lost(), linked, wanted, plan.retired)
        self.gateways.publish(self.catalog.update(self.models, seen, self.scaler.with_scaling_fields))
        await self._execute(plan.actions, {app.app: app.replicas for app in wanted})

    async def _execute(self, actions: Sequence[reconcile.Action], replicas: Mapping[str, int]) -> None:
        """Execute all actions of a plan. If a Ray cluster does not answer during an action, the other actions are still
        executed, and RayAway is raised at the end. `replicas`: number of replicas of each wanted application."""
        away = None
        for action in actions:
            log.info(
                "controller.step_taken", step=type(action).__name__, app=action.app, reason=getattr(action, "why", "")
            )
            try:
                match action:
                    case reconcile.Deploy(app):
                        if settings := self.models.settings(app):  # the models may change during an earlier step
                            await self.backend.deploy(replace(settings, replicas=replicas[app]))
                    case reconcile.Scale(app, count):
                        await self.backend.scale(app, count)
                    case reconcile.Delete(app):
                        await self.backend.delete(app)
            except RayAway as error:
                away = error
        if away is not None:
            raise away

    def _run_scaler(self, snapshot: RaySnapshot, fleet: Sequence[FleetWorker]) -> None:
        """Let the scaler decide the number of replicas of each model."""
        decisions = self.scaler.run_pass(
            [variant.spec for model in self.models.variants for variant in self.models.stable(model)],
            scaling.requested_on_ray(self.models, snapshot, self.retired),
            scaling.workers_of(fleet, {seen.digest: seen.gpu for seen in snapshot.apps.values()}),
            self.now(),
            self.wall_s(),
            blind=not self.gateways.linked,
            room=scaling.room(self.models, snapshot),
        )
        scaling.log_decisions(decisions)
        if self.counters is not None:
            self.counters.count(self.scaler)

    def _wanted_apps(
        self, model: str, snapshot: RaySnapshot, fleet: Sequence[FleetWorker]
    ) -> Iterator[reconcile.Wanted]:
        """Yield the wanted applications of a model, each with a number of replicas. Versions that were rolled back get
        no application.

        On every GPU type in use, each version gets a share of the replicas, so that a comparison of versions does not
        depend on the hardware.
        """
        parts = self.models.shares(model)
        for part in parts:
            if part.gone:
                continue
            choices = self.models.version(model, part.version)
            for variant in choices:
                replicas = replicas_of(self.scaler.replicas(variant.spec), parts)[part.version]
                if replicas or variant is choices[0] or variant.app in snapshot.apps:
                    yield reconcile.Wanted(
                        model=model,
                        digest=variant.digest,
                        replicas=replicas,
                        version=part.version,
                        ray=variant.ray_cluster,
                        stale=_has_other_weights(variant, fleet),
                        gpu=variant.spec.gpu,
                        has_room=scaling.has_room(variant, self.models, snapshot),
                    )

    def _roll_back_bad_canaries(self) -> None:
        """Roll back each canary whose error rate or time to first token is too high, relative to the stable version."""
        tallies: dict[str, CanaryTally] = {}
        for counted in self.gateways.tallies():
            tally = CanaryTally(counted.calls, counted.errors, counted.pairs, counted.slower)
            tallies[counted.generation] = tallies.get(counted.generation, CanaryTally()) + tally
        frozen = self._frozen_models()
        for model in self.models.variants:
            parts = self.models.shares(model)
            if len(parts) == 1 or parts[1].gone or model in frozen:
                continue
            stable, canary = (self.models.version(model, part.version) for part in parts)
            verdict = judge(
                sum((tallies.get(variant.digest, CanaryTally()) for variant in stable), CanaryTally()),
                sum((tallies.get(variant.digest, CanaryTally()) for variant in canary), CanaryTally()),
                error_ratio=canary[0].spec.error_ratio,
                ttft_ratio=canary[0].spec.ttft_ratio,
            )
            if verdict.roll_back:
                log.warning("version.rolled_back", model=model, version=parts[1].version, reason=verdict.why)
                if self.counters is not None:
                    self.counters.count_rollback(model)
                self.models.override(model, parts[1].version, gone=f"rolled back by itself: {verdict.why}")
                self.keep_overrides()

    def _frozen_models(self) -> frozenset[str]:
        """Return the names of the models that operators have frozen, so that changes of these models are not rolled
        out."""
        requests = self.scaler.operator_requests
        return frozenset(self.models.variants) if requests.all_frozen else requests.frozen

    def report_problems(self) -> None:
        """Send the faults that this pass has found to the gateways, if they have lasted."""
        self._problems.update(self.findings(), self.wall_s())
        self.gateways.set_problems(self._problems.current)

    def findings(self) -> Iterator[Finding]:
        """Yield the faults that the controller sees now, however short they have lasted."""
        answers = self.backend.answers() if isinstance(self.backend, MultiClusterBackend) else {}
        away = [name for name, answering in answers.items() if not answering]
        if self.ray_answers is False and not away:
            away = [LOCAL_RAY]
        for name in away:
            yield Finding("ray_away", name, self._away)
        for address, why in self.gateways.unreachable_gateways(self.now()):
            yield Finding("gateway_gone", address, why)
        yield from self._short_of

    def _record_ray_away(self, reason: str) -> None:
        if reason != self._away:
            log.warning("ray.lost", reason=reason)
        self._away = reason
        self.ray_answers = False
        if not self.catalog.entries():
            self.gateways.publish(self.catalog.declare(self.models, reason))


def _has_other_weights(settings: ReplicaSettings, fleet: Sequence[FleetWorker]) -> bool:
    """Return whether every linked worker with these settings has a weight digest other than the pinned one. The result
    is False if no such worker is linked, or if the settings pin no digest."""
    digests = {worker.weight_digest for worker in fleet if worker.generation == settings.digest}
    return bool(settings.spec.digest and digests) and settings.spec.digest not in digests
