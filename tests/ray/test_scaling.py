"""Test of scaling to and from zero: real Ray and Serve, real gateway, real controller loop, simulated engines."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from cluster.api.types import ModelSpec, ModelState
from cluster.controller import scaling
from cluster.controller.controller import Controller
from cluster.controller.desired_models import DesiredModels
from cluster.controller.links import ControllerLinks
from cluster.controller.published_catalog import PublishedCatalog
from cluster.policy.catalog.lifecycle import SourceFacts
from cluster.policy.scaling.inputs import RayReplicas, ScalingSettings
from cluster.policy.scaling.operator_requests import ScalingRequests
from cluster.policy.scaling.scaler import Scaler
from cluster.ray.backend import ChildBackend
from cluster.wire.dial import read
from cluster.worker.settings import ReplicaSettings
from tests.support.calls import chat, rest_of, text_of
from tests.support.checkpoints import build_checkpoint
from tests.support.cluster import bundle_of, running_cluster, until
from tests.support.serving import apps_of, removed

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.thorough]


async def test_to_zero_and_back_on_serve(backend: ChildBackend, tmp_path: Path) -> None:
    """A model is deployed with zero replicas, started by a waiting call, scaled by hand without cutting a stream, and
    scaled to zero when idle. A restarted controller starts no replica."""
    checkpoint = build_checkpoint("llama", tmp_path / "llama")
    bundle = bundle_of(checkpoint)
    async with running_cluster(tmp_path / "gateway") as cluster:
        address = cluster.gateway.endpoints["link"]
        scaler = Scaler(ScalingSettings(cold_start_s=5.0), time.monotonic())
        models = DesiredModels()
        demand = scaling.DemandRecorder(scaler, models.changed.set)
        controller_links = ControllerLinks(
            controller_id="test", gateways=[address], tls=None, bundles=lambda _: bundle, listener=demand
        )
        requests = ScalingRequests(scaler, models.changed.set)
        spec = ModelSpec(
            "sim", f"sim://{checkpoint}?decode_ms=8", min_replicas=0, max_replicas=2, idle_s=1.0, slo_itl_s=1.0
        )
        settings = ReplicaSettings(spec, "test", gateways=(address,), drain_timeout_s=4.0)
        known = {settings.app: SourceFacts(bundle_digest=bundle.digest, max_model_len=2048)}
        controller = Controller(backend, controller_links, models, PublishedCatalog(known), scaler=scaler)
        scaler.run_pass(
            [spec], {("sim", ""): RayReplicas(0)}, [], time.monotonic(), time.time(), blind=True
        )  # as if the model were idle
        models.want([settings])
        tasks = [asyncio.create_task(controller_links.run()), asyncio.create_task(controller.run())]

        def state() -> ModelState | None:
            model = cluster.gateway.directory.find("sim")
            return None if model is None else model.state

        def links() -> int:
            return len(cluster.gateway.hub.links)

        try:
            await until(lambda: state() is ModelState.IDLE, "it is deployed at zero", 240)
            assert links() == 0
            stream = cluster.stub.StreamChat(chat(max_tokens=800, ignore_eos=True), timeout=480)
            first = await read(stream)
            assert first.HasField("progress")
            await until(lambda: links() == 1, "the held call has started a replica", 240)
            requests.scale("sim", 2)
            await until(lambda: links() == 2, "there are two replicas", 240)
            requests.scale("sim", None)
            chunks = [first, *await rest_of(stream)]
            assert chunks[-1].usage.completion_tokens == 800
            assert text_of(chunks)
            assert 0.0 < requests.explain("sim", 0).model.cold_start_s < 240.0
            await until(lambda: state() is ModelState.IDLE and links() == 0, "it is scaled to zero when idle", 240)
            later = Controller(backend, controller_links, scaler=Scaler(ScalingSettings(), time.monotonic()))
            later.models.want([settings])
            tasks.pop().cancel()
            for _ in range(3):
                await later.step()
            assert apps_of(await backend.observe(), "sim")[0].target == 0
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    await removed(backend, "sim")
