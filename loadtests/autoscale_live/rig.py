"""Test bed of a live run: a gateway, a controller that scales, a Ray of its own, and one model that begins at zero
replicas.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

from cluster.api.types import ModelSpec
from cluster.controller import scaling
from cluster.controller.bundling import describe
from cluster.controller.controller import Controller
from cluster.controller.desired_models import DesiredModels
from cluster.controller.links import ControllerLinks
from cluster.controller.published_catalog import PublishedCatalog
from cluster.policy.catalog.reconcile import Observed
from cluster.policy.scaling.inputs import RayReplicas, ScalingSettings
from cluster.policy.scaling.operator_requests import ScalingRequests
from cluster.policy.scaling.scaler import Scaler
from cluster.ray.backend import ChildBackend
from cluster.ray.local_cluster import LocalRay, LocalRaySettings
from cluster.worker.settings import ReplicaSettings
from loadtests.autoscale_live.calls import MODEL, Callers, CallResult
from loadtests.autoscale_live.traffic import PlannedCall
from tests.support.cluster import bundle_of, running_cluster, until

DRAIN_S = 300.0
"""The default drain time in seconds. Streams that begin on a version end on the same version within this time."""
SAMPLE_S = 0.25


class Watch:
    """Recorder of the numbers of replicas over time: running, starting and desired replicas."""

    def __init__(self, scaler: Scaler) -> None:
        self._scaler = scaler
        self.samples: list[tuple[float, int, int, int]] = []

    async def run(self) -> None:
        """Record samples until cancelled."""
        while True:
            counts = self._scaler.scaling_of(MODEL)
            self.samples.append((time.monotonic(), counts.running, counts.starting, counts.desired))
            await asyncio.sleep(SAMPLE_S)

    def gpu_seconds(self, since: float, until_: float) -> float:
        """Return the GPU-seconds of the replicas that start or serve between two times."""
        inside = [sample for sample in self.samples if since <= sample[0] <= until_]
        return sum((b[0] - a[0]) * (a[1] + a[2]) for a, b in itertools.pairwise(inside))


class Live:
    """Parts of a live run: the controller, the callers and Ray."""

    def __init__(
        self,
        controller: Controller,
        desk: ScalingRequests,
        callers: Callers,
        links: Callable[[], int],
        settings: ReplicaSettings,
        watch: Watch,
        ray: LocalRay,
    ) -> None:
        self.controller, self.desk, self.callers, self.links = controller, desk, callers, links
        self.settings, self.watch, self.ray = settings, watch, ray

    async def until_at_zero(self) -> None:
        """Wait until the model has no replicas on Ray and no links."""
        await until(lambda: self.links() == 0, "no replica is linked", 120)
        await self.until_on_ray(lambda app: not (app.leaving or app.running or app.placed))

    async def until_on_ray(self, holds: Callable[[Observed], bool]) -> None:
        """Wait until `holds` is true for what Ray reports of the model."""
        deadline = time.monotonic() + 120
        while not [app for app in (await self._apps()) if holds(app)]:
            if time.monotonic() > deadline:
                raise TimeoutError("Ray's applications did not reach the expected state")
            await asyncio.sleep(0.2)

    async def _apps(self) -> Sequence[Observed]:
        snapshot = await self.controller.backend.observe()
        return [app for app in snapshot.apps.values() if app.model == MODEL and not app.deleting]

    async def cold_start(self) -> float:
        """Start a replica by hand; return the seconds from the command to a worker with capacity."""
        began = time.monotonic()
        self.desk.scale(MODEL, 1)
        await until(lambda: self.links() == 1, "it serves", 120)
        took_s = time.monotonic() - began
        self.desk.scale(MODEL, 0)
        await self.until_at_zero()
        self.desk.scale(MODEL, None)
        return took_s

    async def from_zero(self, number: int) -> CallResult:
        """Call the model while it has no replica, then scale it back to zero replicas. Returns the result of the
        call."""
        result = await self.callers.call(PlannedCall(0.0, 20, number % 2, 0))
        self.desk.scale(MODEL, 0)
        await self.until_at_zero()
        self.desk.scale(MODEL, None)
        return result


@asynccontextmanager
async def running_test_bed(folder: Path, checkpoint: Path, spec: ModelSpec) -> AsyncIterator[Live]:
    """Start all parts of the test bed. They run until the context ends, or until SIGTERM ends the process."""
    if task := asyncio.current_task():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    bundle = bundle_of(checkpoint)
    ray = LocalRay(LocalRaySettings(f"live-{uuid.uuid4().hex[:8]}", Path(tempfile.mkdtemp(prefix="hr-"))))
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, ray.log_file.parent, ignore_errors=True)
        stack.callback(ray.stop)
        await asyncio.to_thread(ray.start)
        backend = ChildBackend("live", ray.address, ray.environment(), ray.log_file.parent / "driver.log")
        stack.push_async_callback(backend.close)
        cluster = await stack.enter_async_context(running_cluster(folder / "gateway"))
        ends = cluster.gateway.endpoints
        scaler = Scaler(ScalingSettings(cold_start_s=10.0), time.monotonic())
        models = DesiredModels()
        end = ControllerLinks(
            controller_id="live",
            gateways=[ends["link"]],
            tls=None,
            bundles=lambda _: bundle,
            listener=scaling.DemandRecorder(scaler, models.changed.set),
        )
        scaler.run_pass([spec], {(MODEL, ""): RayReplicas(0)}, [], time.monotonic(), time.time(), blind=True)
        settings = ReplicaSettings(spec, "live", gateways=(ends["link"],), drain_timeout_s=DRAIN_S)
        known = {settings.app: replace(describe(bundle), max_model_len=spec.max_model_len or 2048)}
        controller = Controller(backend, end, models, PublishedCatalog(known), scaler=scaler)
        models.want([settings])
        watch = Watch(scaler)
        parts = [asyncio.create_task(part) for part in (end.run(), controller.run(), watch.run())]
        callers = Callers(ends["grpc"], ends["http"])
        stack.push_async_callback(callers.close)
        desk = ScalingRequests(scaler, models.changed.set)
        live = Live(controller, desk, callers, lambda: len(cluster.gateway.hub.links), settings, watch, ray)
        try:
            await live.until_on_ray(lambda app: bool(app.digest))
            yield live
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
            await asyncio.wait_for(backend.shutdown(), 30)
