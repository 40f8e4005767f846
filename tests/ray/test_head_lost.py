"""Ray's head is lost for a while, its tables kept by Valkey: streams and new calls go on, and afterwards nobody healthy
is touched."""

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

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(1500)]

AWAY_S = float(os.environ.get("HEAD_AWAY_S", "10"))
CALLERS, TOKENS, STEADY_PASSES = 2, 24, 5
PAUSE_S = 5.0
"""Between calls of a caller: core and ranks wait by spinning, till a second after their last step, and leave a head no
core to start on."""


@pytest.fixture
def ray_with_head() -> Iterator[HeadAndNode]:
    """A head, and a node with sixteen logical GPUs."""
    with head_and_node(ENGINE_ENVIRONMENT) as made:
        yield made


class Journal(JobBackend):
    """Notes what is changed on Ray, and how often it was looked at."""

    changes: list[str]
    looks: int = 0

    async def observe(self) -> RaySnapshot:
        """Counted once it is answered."""
        snapshot = await super().observe()
        self.looks += 1
        return snapshot

    async def deploy(self, settings: ReplicaSettings) -> None:
        """Noted."""
        self.changes.append(f"deploy {settings.spec.name}")
        await super().deploy(settings)

    async def scale(self, model: str, replicas: int) -> None:
        """Noted."""
        self.changes.append(f"scale {model} {replicas}")
        await super().scale(model, replicas)

    async def delete(self, model: str) -> None:
        """Noted."""
        self.changes.append(f"delete {model}")
        await super().delete(model)


@dataclass
class Callers:
    """Callers that stream one answer after the other, and what was wrong with any."""

    cluster: TestCluster
    whole: str
    ended: int = 0
    faults: list[str] = field(default_factory=list)

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`, all of them."""
        await asyncio.gather(*(self._one(stop) for _ in range(CALLERS)))

    async def _one(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            chunks = [chunk async for chunk in self.cluster.stub.StreamChat(request("tp2"), timeout=60)]
            self.ended += 1
            if text_of(chunks) != self.whole or chunks[-1].usage.resumed:
                self.faults.append(f"{text_of(chunks)!r}, resumed {chunks[-1].usage.resumed} times")
            await asyncio.sleep(PAUSE_S)


def request(model: str) -> pb.ChatRequest:
    """The same each time."""
    return chat(model=model, max_tokens=TOKENS, ignore_eos=True)


@dataclass
class World:
    """A gateway, and a controller that drives the Ray whose head will be lost."""

    cluster: TestCluster
    controller: Controller
    backend: Journal
    link: str
    """Where the replicas dial."""

    def incarnations(self, model: str) -> set[str]:
        """Of the model's workers that are linked."""
        links = self.cluster.gateway.hub.links
        return {one.identity.incarnation for one in links if one.identity.model == model and one.free.sequences}

    @property
    def away(self) -> bool:
        """Whether the controller has noticed."""
        return "Ray is away" in repr(self.controller)

    def state(self, model: str) -> ModelState | None:
        """As the gateway knows it."""
        known = self.cluster.gateway.directory.find(model)
        return known.entry.state if known else None


@asynccontextmanager
async def world(ray: HeadAndNode, folder: Path) -> AsyncIterator[World]:
    """A gateway with its controller at work."""
    backend = Journal("test", ray.dashboard_url, ray.token_file)
    backend.changes = []
    async with (
        running_cluster(folder / "gateway") as cluster,
        cuttable(cluster.gateway.endpoints["link"], ray.net.address) as door,  # links without TLS are for loopback
    ):
        links = [cluster.gateway.endpoints["link"]]
        end = ControllerLinks(controller_id="test", gateways=links, tls=None, bundles=lambda _: None)
        controller = Controller(backend, end)
        parts = [asyncio.create_task(end.run()), asyncio.create_task(controller.run())]
        try:
            yield World(cluster, controller, backend, door.address)
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
            await backend.close()


def simulated(world: World, folder: Path, replicas: int) -> ReplicaSettings:
    """A model whose replicas come fast."""
    spec = ModelSpec("sim", f"sim://{folder}?decode_ms=2", min_replicas=replicas, max_replicas=replicas)
    return ReplicaSettings(spec, "test", gateways=(world.link,))


async def test_the_head_is_lost_and_comes_back(ray_with_head: HeadAndNode, tmp_path: Path) -> None:
    """TP 2 on vLLM: with the head's processes killed every stream and new call ends as before; the catalog stays; when
    it is back no worker is restarted, nothing is deployed anew, and scaling works again."""
    checkpoint = build_checkpoint("llama", tmp_path / "llama")
    async with world(ray_with_head, tmp_path) as its:
        engine = two_ranks("tp2", checkpoint, its.link)
        its.controller.want([engine, simulated(its, checkpoint, 1)])
        await until(lambda: bool(its.incarnations("tp2") and its.incarnations("sim")), "both are linked", 240)
        await until(lambda: its.state("tp2") is its.state("sim") is ModelState.READY, "both are ready", 30)
        before = [its.incarnations("tp2"), its.incarnations("sim")]
        assert sorted(its.backend.changes) == ["deploy sim", "deploy tp2"]
        whole = text_of([chunk async for chunk in its.cluster.stub.StreamChat(request("tp2"))])
        callers, stop = Callers(its.cluster, whole), asyncio.Event()
        calling = asyncio.create_task(callers.run(stop))
        await until(lambda: callers.ended > CALLERS, "calls come and go")

        ray_with_head.lose_head()
        lost_at, ended = time.monotonic(), callers.ended
        await until(lambda: its.away, "the controller has noticed", 60)
        await until(lambda: time.monotonic() > lost_at + AWAY_S, "the head has been away for long", AWAY_S + 1)
        assert its.state("tp2") is its.state("sim") is ModelState.READY, "the catalog stays"
        await until(lambda: callers.ended >= ended + 2 * CALLERS, "calls that begin without a head end", 60)
        assert not calling.done()

        await asyncio.to_thread(ray_with_head.find_head)
        await until(lambda: not its.away, "the controller sees Ray again", 180)
        looks = its.backend.looks
        await until(lambda: its.backend.looks >= looks + STEADY_PASSES, "it has looked again and again", 60)
        assert not its.away
        assert [its.incarnations("tp2"), its.incarnations("sim")] == before, "a healthy worker was restarted"
        assert sorted(its.backend.changes) == ["deploy sim", "deploy tp2"], "something was made anew"
        its.controller.want([engine, simulated(its, checkpoint, 2)])
        await until(lambda: len(its.incarnations("sim")) == 2, "scaling works again", 60)
        assert before[1] < its.incarnations("sim")
        stop.set()
        await calling
        assert callers.faults == []
        assert its.incarnations("tp2") == before[0]
