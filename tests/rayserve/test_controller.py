"""The controller's loop over a fake Ray and fake gateways: what it does, what it tells, what it survives."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster.api.types import CatalogEntry, ModelSpec, ModelState
from cluster.config import parse
from cluster.link.controller import FleetWorker
from cluster.rayserve.backend import RayAway
from cluster.rayserve.controller import Controller, run_controller, settings_of
from cluster.rayserve.settings import ReplicaSettings
from tests.support.fake_ray import FakeRay
from tests.support.serving import eventually


@dataclass
class FakeGateways:
    """Keeps what was published."""

    workers: list[FleetWorker] = field(default_factory=list)
    linked: int = 1
    published: dict[str, CatalogEntry] = field(default_factory=dict)

    def publish(self, entries: Sequence[CatalogEntry]) -> None:
        """Keep."""
        self.published = {entry.name: entry for entry in entries}

    def fleet(self) -> Sequence[FleetWorker]:
        """As set."""
        return self.workers

    def state(self, model: str) -> ModelState:
        """As last published."""
        return self.published[model].state


def settings(name: str, **more: object) -> ReplicaSettings:
    """A model's settings."""
    return ReplicaSettings(ModelSpec(name=name, source=f"/{name}", **more), "test")  # type: ignore[arg-type]


def controller(ray: FakeRay, gateways: FakeGateways, *wanted: ReplicaSettings, now_s: float = 100.0) -> Controller:
    """A controller that wants these."""
    made = Controller(ray, gateways, wall_s=lambda: now_s)
    made.want(wanted)
    return made


async def test_states_follow_what_is_seen() -> None:
    """DECLARED, PLACING, LOADING, READY only when a gateway has the link, and how long the start took."""
    ray, gateways = FakeRay(), FakeGateways()
    loop = controller(ray, gateways, settings("m"), now_s=130.0)

    async def state() -> ModelState:
        await loop.step()
        return gateways.state("m")

    assert await state() is ModelState.DECLARED
    assert await state() is ModelState.PLACING
    ray.change("m", placed=1, deployed_at_s=100.0)
    assert await state() is ModelState.LOADING
    ray.change("m", placed=0, running=1)
    assert await state() is ModelState.LOADING, "no gateway can reach it yet"
    gateways.workers.append(FleetWorker("w", "i", "m", bundle_digest="sha256:b", max_model_len=77))
    assert await state() is ModelState.READY
    told = gateways.published["m"]
    assert (told.bundle_digest, told.max_model_len, told.cold_start_s) == ("sha256:b", 77, 30.0)
    ray.change("m", running=0)
    gateways.workers.clear()
    assert await state() is ModelState.PLACING
    assert gateways.published["m"].bundle_digest == "sha256:b"
    assert ray.journal == ["deploy m"]


async def test_a_new_controller_leaves_all_as_it_is() -> None:
    """What an earlier controller made is recognised by its digest alone."""
    ray, gateways = FakeRay(), FakeGateways(linked=0)
    await controller(ray, gateways, settings("a"), settings("b")).step()
    ray.change("a", running=1)
    ray.journal.clear()
    renamed = settings("a", aliases=("x",))
    await controller(ray, gateways, renamed, settings("b")).step()
    assert ray.journal == []
    assert gateways.state("a") is ModelState.READY
    assert gateways.published["a"].aliases == ("x",)


async def test_removed_model_drains_and_leaves_the_catalog() -> None:
    """DRAINING while Ray still has it, then no entry at all; back again it begins anew."""
    ray, gateways = FakeRay(), FakeGateways(linked=0)
    loop = controller(ray, gateways, settings("m"))
    await loop.step()
    loop.want([])
    await loop.step()
    assert gateways.state("m") is ModelState.DRAINING
    assert ray.journal == ["deploy m", "delete m"]
    await loop.step()
    assert gateways.published == {}
    loop.want([settings("m")])
    await loop.step()
    assert gateways.state("m") is ModelState.DECLARED


async def test_unplaceable_model_fails_and_recovers() -> None:
    """FAILED with the need, until a node that is large enough has joined."""
    ray, gateways = FakeRay(nodes=({"CPU": 8.0, "GPU": 1.0},)), FakeGateways()
    loop = controller(ray, gateways, settings("m", tensor_parallel_size=2))
    await loop.step()
    await loop.step()
    assert gateways.state("m") is ModelState.FAILED
    assert "needs 2 GPUs" in gateways.published["m"].state_reason
    ray.nodes = ({"CPU": 8.0, "GPU": 2.0},)
    await loop.step()
    assert gateways.state("m") is ModelState.PLACING


@pytest.mark.slow
async def test_ray_away_keeps_the_catalog_and_is_taken_up_again() -> None:
    """While Ray is away what was told stays told; when it is back, empty, everything is made again."""
    ray, gateways = FakeRay(away="gone fishing"), FakeGateways(linked=0)
    loop = controller(ray, gateways, settings("m"))
    with pytest.raises(RayAway):
        await loop.step()
    running = asyncio.create_task(loop.run())
    try:
        await eventually(lambda: gateways.published.get("m"), "the model is told although Ray is away")
        assert gateways.state("m") is ModelState.DECLARED
        assert gateways.published["m"].state_reason == "gone fishing"
        ray.away = ""
        await eventually(lambda: "m" in ray.apps, "it is deployed")
        ray.change("m", running=1)
        await eventually(lambda: gateways.state("m") is ModelState.READY, "it is ready")
        ray.away = "gone again"
        loop.want([settings("m"), settings("n")])
        await eventually(lambda: "gone again" in repr(loop), "the loss is noticed")
        assert gateways.state("m") is ModelState.READY
        ray.apps.clear()
        ray.away = ""
        await eventually(lambda: set(ray.apps) == {"m", "n"}, "both are deployed")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert ray.journal == ["deploy m", "deploy m", "deploy n"]


CONFIG = """
api_version: headrace/v1
name: prod
gateway: {drain_timeout_s: 9}
link: {gateways: ["10.0.0.1:50052"], tls: {cert_file: /c, key_file: /k, ca_file: /a}}
ray: [{name: blue, dashboard_url: "http://ray:8265"}]
weights: {cache_dir: /models, hugging_face: {endpoint: "https://mirror.example"}, allow: {sources: ["/m/*"]}}
models: [{name: m, source: /m/x, replicas: {min: 2}}]
"""


def test_settings_come_from_the_configuration() -> None:
    """Every key that a replica needs reaches it."""
    (made,) = settings_of(parse(CONFIG), gateways=["10.0.0.1:50052"], local=False)
    assert (made.cluster, made.ray_cluster, made.gateways) == ("prod", "blue", ("10.0.0.1:50052",))
    assert (made.cache_dir, made.hugging_face_endpoint) == ("/models", "https://mirror.example")
    assert (made.allowed_sources, made.drain_timeout_s, made.spec.replicas) == (("/m/*",), 9.0, 2)
    assert made.tls is not None
    assert made.tls.cert_file == Path("/c")
    (local,) = settings_of(parse(CONFIG), gateways=[], local=True)
    assert dataclasses.replace(local, gateways=made.gateways, ray_cluster="blue", drain_timeout_s=9.0) == made


async def test_several_ray_clusters_are_refused(tmp_path: Path) -> None:
    """A second entry is refused in words rather than ignored."""
    config = parse(CONFIG.replace("ray: [", 'ray: [{name: green, dashboard_url: "http://green:8265"}, '))
    with pytest.raises(ValueError, match="ray: this release drives one Ray cluster, and there are 2"):
        await run_controller(
            config, instance="i", ray_address=None, gateways=[], run_folder=tmp_path, stop=asyncio.Event()
        )
