"""Test of a temporary loss of Ray's head, whose tables are in Valkey. Streams and new calls continue, and no healthy
replica is restarted afterwards.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster.api.types import ModelSpec, ModelState
from cluster.controller.controller import Controller
from cluster.controller.links import ControllerLinks
from cluster.ray.backend import RaySnapshot
from cluster.ray.jobs import JobBackend
from cluster.v1 import inference_pb2 as pb
from cluster.worker.settings import ReplicaSettings
from tests.ray.conftest import ENGINE_ENVIRONMENT
from tests.ray.test_engines import two_ranks
from tests.support.calls import chat, text_of
from tests.support.checkpoints import build_checkpoint
from tests.support.cluster import TestCluster, running_cluster, until
from tests.support.cuttable import cuttable
from tests.support.ray_head import HeadAndNode, head_and_node

pytestmark = [
    pytest.mark.ray,
    pytest.mark.engine,
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(1500),
]

AWAY_S = float(os.environ.get("HEAD_AWAY_S", "10"))
CALLERS, TOKENS, STEADY_PASSES = 2, 24, 5
PAUSE_S = 5.0
"""Seconds between two calls of a caller.

The engine core and the ranks spin until a second after the last step. Without pauses, the head would get no CPU core
for the start.
"""


@pytest.fixture
def ray_with_head() -> Iterator[HeadAndNode]:
    """A Ray cluster of a head and one node with sixteen logical GPUs."""
    with head_and_node(ENGINE_ENVIRONMENT) as started:
        yield started


class Journal(JobBackend):
    """A JobBackend that records the changes on Ray and counts the observations."""

    changes: list[str]
    observations: int = 0

    async def observe(self) -> RaySnapshot:
        """Observe Ray, and count the observation if no error is raised."""
        snapshot = await super().observe()
        self.observations += 1
        return snapshot

    async def deploy(self, settings: ReplicaSettings) -> None:
        """Record the change, and deploy the application."""
        self.changes.append(f"deploy {settings.spec.name}")
        await super().deploy(settings)

    async def scale(self, model: str, replicas: int) -> None:
        """Record the change, and scale the application."""
        self.changes.append(f"scale {model} {replicas}")
        await super().scale(model, replicas)

    async def delete(self, model: str) -> None:
        """Record the change, and delete the application."""
        self.changes.append(f"delete {model}")
        await super().delete(model)


@dataclass
class Callers:
    """Callers that each stream one answer after another, and record the faults that they see."""

    cluster: TestCluster
    whole: str
    ended: int = 0
    faults: list[str] = field(default_factory=list)

    async def run(self, stop: asyncio.Event) -> None:
        """Run all callers until `stop`."""
        await asyncio.gather(*(self._caller(stop) for _ in range(CALLERS)))

    async def _caller(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            chunks = [chunk async for chunk in self.cluster.stub.StreamChat(request("tp2"), timeout=60)]
            self.ended += 1
            if text_of(chunks) != self.whole or chunks[-1].usage.resumed:
                self.faults.append(f"{text_of(chunks)!r}, resumed {chunks[-1].usage.resumed} times")
            await asyncio.sleep(PAUSE_S)


def request(model: str) -> pb.ChatRequest:
    """Return the request that a caller sends to a model. It is the same each time."""
    return chat(model=model, max_tokens=TOKENS, ignore_eos=True)


@dataclass
class Deployment:
    """A gateway, and a controller of the Ray cluster whose head will be lost."""

    cluster: TestCluster
    controller: Controller
    backend: Journal
    link: str
    """Link address to which replicas connect."""

    def incarnations(self, model: str) -> set[str]:
        """Return the incarnations of the model's linked workers that accept calls."""
        links = self.cluster.gateway.hub.links
        return {link.identity.incarnation for link in links if link.identity.model == model and link.free.sequences}

    @property
    def away(self) -> bool:
        """Whether the controller considers Ray unreachable."""
        return "Ray is away" in repr(self.controller)

    def state(self, model: str) -> ModelState | None:
        """Return a model's state at the gateway."""
        known = self.cluster.gateway.directory.find(model)
        return known.entry.state if known else None


@asynccontextmanager
async def running_deployment(ray: HeadAndNode, folder: Path) -> AsyncIterator[Deployment]:
    """Run a gateway and a controller."""
    backend = Journal("test", ray.dashboard_url, ray.token_file)
    backend.changes = []
    async with (
        running_cluster(folder / "gateway") as cluster,
        cuttable(cluster.gateway.endpoints["link"], ray.net.address) as door,  # links without TLS are for loopback
    ):
        gateways = [cluster.gateway.endpoints["link"]]
        links = ControllerLinks(controller_id="test", gateways=gateways, tls=None, bundles=lambda _: None)
        controller = Controller(backend, links)
        tasks = [asyncio.create_task(links.run()), asyncio.create_task(controller.run())]
        try:
            yield Deployment(cluster, controller, backend, door.address)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await backend.close()


def simulated(deployment: Deployment, folder: Path, replicas: int) -> ReplicaSettings:
    """Return settings of a simulated model, whose replicas start fast."""
    spec = ModelSpec("sim", f"sim://{folder}?decode_ms=2", min_replicas=replicas, max_replicas=replicas)
    return ReplicaSettings(spec, "test", gateways=(deployment.link,))


async def test_the_head_is_lost_and_comes_back(ray_with_head: HeadAndNode, tmp_path: Path) -> None:
    """While Ray's head node is lost, streams and new calls go on and the catalog is unchanged. Once the head is back,
    no worker is restarted, nothing is deployed again, and scaling works. The model runs in vLLM with TP 2."""
    checkpoint = build_checkpoint("llama", tmp_path / "llama")
    async with running_deployment(ray_with_head, tmp_path) as deployment:
        engine = two_ranks("tp2", checkpoint, deployment.link)
        deployment.controller.models.want([engine, simulated(deployment, checkpoint, 1)])
        await until(
            lambda: bool(deployment.incarnations("tp2") and deployment.incarnations("sim")), "both are linked", 240
        )
        await until(
            lambda: deployment.state("tp2") is deployment.state("sim") is ModelState.READY, "both are ready", 30
        )
        before = [deployment.incarnations("tp2"), deployment.incarnations("sim")]
        assert sorted(deployment.backend.changes) == ["deploy sim", "deploy tp2"]
        whole = text_of([chunk async for chunk in deployment.cluster.stub.StreamChat(request("tp2"))])
        callers, stop = Callers(deployment.cluster, whole), asyncio.Event()
        calling = asyncio.create_task(callers.run(stop))
        await until(lambda: callers.ended > CALLERS, "calls come and go")

        ray_with_head.lose_head()
        lost_at, ended = time.monotonic(), callers.ended
        await until(lambda: deployment.away, "the controller has noticed", 240)
        await until(lambda: time.monotonic() > lost_at + AWAY_S, "the head has been away for long", AWAY_S + 1)
        assert deployment.state("tp2") is deployment.state("sim") is ModelState.READY, "the catalog stays"
        await until(lambda: callers.ended >= ended + 2 * CALLERS, "calls that begin without a head end", 240)
        assert not calling.done()

        await asyncio.to_thread(ray_with_head.find_head)
        await until(lambda: not deployment.away, "the controller sees Ray again", 180)
        observations = deployment.backend.observations
        await until(
            lambda: deployment.backend.observations >= observations + STEADY_PASSES,
            "it has observed Ray several times",
            240,
        )
        assert not deployment.away
        assert [deployment.incarnations("tp2"), deployment.incarnations("sim")] == before, (
            "a healthy worker was restarted"
        )
        assert sorted(deployment.backend.changes) == ["deploy sim", "deploy tp2"], "something was deployed again"
        deployment.controller.models.want([engine, simulated(deployment, checkpoint, 2)])
        await until(lambda: len(deployment.incarnations("sim")) == 2, "scaling works again", 240)
        assert before[1] < deployment.incarnations("sim")
        stop.set()
        await calling
        assert callers.faults == []
        assert deployment.incarnations("tp2") == before[0]
