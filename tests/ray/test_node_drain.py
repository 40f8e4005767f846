"""Tests of SIGTERM to a node's `ray start --block` while streams run: real Ray, real gateway, simulated engines."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from cluster.api.types import DrainState, ModelSpec
from cluster.controller.controller import Controller
from cluster.controller.links import ControllerLinks
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.server import Gateway
from cluster.link.v1 import link_pb2 as link_pb
from cluster.ray.backend import ChildBackend
from cluster.ray.drain_time import TIMEOUT_ENV
from cluster.worker.settings import ReplicaSettings
from tests.support.calls import chat, rest_of, text_of
from tests.support.checkpoints import build_checkpoint
from tests.support.cluster import TestCluster, bundle_of, running_cluster, sim_engine, until
from tests.support.cpu import slowness
from tests.support.ray_head import OWN_PROCESSES
from tests.support.ray_nodes import RayNodes, ray_nodes
from tests.support.serving import settled

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

DRAIN_S = 6.0
SHORT, LONG = 100, 750
"""Numbers of tokens: SHORT streams end by themselves in the first half of DRAIN_S, and LONG streams do not."""
ASKS = [chat(f"Story {n}", max_tokens=LONG if n % 2 else SHORT, ignore_eos=True) for n in range(20)]


@dataclasses.dataclass
class Replicas:
    """The replicas of the simulated model on a Ray cluster of several nodes. A controller manages them."""

    ray: RayNodes
    backend: ChildBackend
    controller: Controller
    settings: ReplicaSettings

    def want(self, replicas: int) -> None:
        """Set the number of replicas."""
        spec = dataclasses.replace(self.settings.spec, min_replicas=replicas, max_replicas=replicas)
        self.controller.models.want([dataclasses.replace(self.settings, spec=spec)])


@contextlib.asynccontextmanager
async def serving(cluster: TestCluster, ray: RayNodes, folder: Path) -> AsyncIterator[Replicas]:
    """Run a controller and a Ray backend. The settings are those of a simulated model, and no replica runs at first."""
    address = cluster.gateway.endpoints["link"]
    spec = ModelSpec("sim", f"sim://{folder}?decode_ms=8&max_num_seqs=64")
    settings = ReplicaSettings(spec, "test", gateways=(address,), drain_timeout_s=DRAIN_S)
    links = ControllerLinks(controller_id="test", gateways=[address], tls=None, bundles=lambda _: None)
    backend = ChildBackend("test", ray.head.address, ray.head.environment(), ray.folder / "driver.log")
    controller = Controller(backend, links)
    tasks = [asyncio.create_task(links.run()), asyncio.create_task(controller.run())]
    try:
        yield Replicas(ray, backend, controller, settings)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await backend.close()


def open_links(gateway: Gateway) -> list[WorkerLink]:
    """Return the links of workers that accept calls of `sim`."""
    links = [link for link in gateway.hub.links if link.identity.model == "sim"]
    return [link for link in links if link.takes_new_requests and link.free.sequences]


@pytest.mark.root
@pytest.mark.thorough
def test_a_pods_hook_ends_its_node() -> None:
    """`headrace pod drain` ends the only Ray node of the pod and succeeds. When Kubernetes then sends SIGTERM, nothing
    is left to wait for."""
    with ray_nodes(DRAIN_S) as ray:
        ray.add("pod", *OWN_PROCESSES)
        process = ray.nodes["pod"]
        while "Ray runtime started" not in ray.log_of("pod"):
            assert process.poll() is None, ray.log_of("pod")
            time.sleep(0.1)
        (first,) = psutil.Process(process.pid).children()
        hook = ["nsenter", f"--target={first.pid}", "--pid", "--mount", sys.executable, "-m", "cluster.cli.main"]
        environment = {**os.environ, **ray.head.environment(), TIMEOUT_ENV: "20"}
        done = subprocess.run(
            [*hook, "pod", "drain"], env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        first.terminate()
        process.wait(60)


@pytest.mark.thorough
async def test_sigterm_to_a_node_breaks_no_stream(tmp_path: Path) -> None:
    """When a node with twenty streams gets SIGTERM, each stream has the text of an undisturbed stream.

    Short streams end on the node, some long streams resume on another node, and the node ends before the deadline.
    """
    checkpoint = build_checkpoint("llama", tmp_path / "llama")
    with ray_nodes(DRAIN_S) as ray:
        ray.add("first")
        async with running_cluster(tmp_path / "gateway") as cluster, serving(cluster, ray, checkpoint) as replicas:
            gateway = cluster.gateway
            replicas.want(1)
            await until(lambda: bool(open_links(gateway)), "a replica has dialled in", 240)
            (leaving,) = open_links(gateway)
            ray.add("second")
            await settled(replicas.backend, lambda seen: len(seen.nodes) == 3, "the second node has joined")
            replicas.want(2)
            await until(lambda: len(open_links(gateway)) == 2, "another replica has dialled in", 240)
            (other,) = [link for link in open_links(gateway) if link is not leaving]
            assert other.identity.node != leaving.identity.node
            other.box.command(link_pb.Command(cordon=link_pb.Cordon()))
            await until(lambda: open_links(gateway) == [leaving], "all streams begin on the node that goes")
            streams = [cluster.stub.StreamChat(ask) for ask in ASKS]
            begun = [await stream.read() for stream in streams]
            assert leaving.running == 20
            other.box.command(link_pb.Command(uncordon=link_pb.Uncordon()))
            process, asked_at = ray.terminate("first"), time.monotonic()
            await until(lambda: leaving.drain_state is DrainState.DRAINING, "the replica has begun to drain")
            ended = await asyncio.gather(*map(rest_of, streams))
            await asyncio.to_thread(process.wait, 120)
            took_s = time.monotonic() - asked_at
            assert "ungracefully" not in ray.log_of("first")
            assert ray.nodes["second"].poll() is None
        async with running_cluster(tmp_path / "undisturbed") as cluster:
            await cluster.add_worker(sim_engine(checkpoint, decode_ms=0.1), bundle_of(checkpoint))
            whole = await asyncio.gather(*(rest_of(cluster.stub.StreamChat(ask)) for ask in ASKS))
    answers = [[first, *rest] for first, rest in zip(begun, ended, strict=True)]
    assert [text_of(chunks) for chunks in answers] == [text_of(chunks) for chunks in whole]
    resumed = [chunks[-1].usage.resumed for chunks in answers]
    assert not any(resumed[::2])
    assert any(resumed[1::2])
    assert took_s < (DRAIN_S + 15.0) * slowness(time.monotonic)
