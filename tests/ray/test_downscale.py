"""Test of a replica that Serve removes while streams run: real Ray, real gateway, simulated engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.api.types import ModelSpec
from cluster.controller.controller import Controller
from cluster.controller.links import ControllerLinks
from cluster.ray.backend import ChildBackend
from cluster.worker.settings import ReplicaSettings
from tests.support.calls import chat, rest_of, text_of
from tests.support.checkpoints import build_checkpoint
from tests.support.cluster import running_cluster, until
from tests.support.serving import removed

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.thorough]


def sim(folder: Path, address: str, replicas: int) -> ReplicaSettings:
    """Return settings of the simulated model `sim`. The drain timeout is shorter than the test's streams."""
    spec = ModelSpec("sim", f"sim://{folder}?decode_ms=8", min_replicas=replicas, max_replicas=replicas)
    return ReplicaSettings(spec, "test", gateways=(address,), drain_timeout_s=4.0)


async def test_a_downscale_cuts_no_stream(backend: ChildBackend, tmp_path: Path) -> None:
    """Two replicas have one stream each, and Serve ends one replica. Its stream resumes on the other replica, which is
    not restarted. Both streams are complete."""
    checkpoint = build_checkpoint("llama", tmp_path / "llama")
    async with running_cluster(tmp_path / "gateway") as cluster:
        address = cluster.gateway.endpoints["link"]

        def links() -> dict[str, int]:
            return {link.identity.incarnation: link.running for link in cluster.gateway.hub.links}

        controller_links = ControllerLinks(controller_id="test", gateways=[address], tls=None, bundles=lambda _: None)
        controller = Controller(backend, controller_links)
        controller.models.want([sim(checkpoint, address, 2)])
        await controller.step()
        await until(lambda: len(links()) == 2, "both replicas have dialled in", 240)
        await until(lambda: all(link.free.sequences for link in cluster.gateway.hub.links), "both have room")
        request = chat(max_tokens=1200, ignore_eos=True)
        streams = [cluster.stub.StreamChat(request) for _ in range(2)]
        begun = [await stream.read() for stream in streams]
        before = links()
        assert sorted(before.values()) == [1, 1], "each replica has one stream"
        controller.models.want([sim(checkpoint, address, 1)])
        await controller.step()
        ended = [[first, *await rest_of(stream)] for first, stream in zip(begun, streams, strict=True)]
        whole = [chunk async for chunk in cluster.stub.StreamChat(request)]
        assert [text_of(chunks) for chunks in ended] == [text_of(whole)] * 2
        assert sorted(chunks[-1].usage.resumed for chunks in ended) == [0, 1]
        await until(lambda: len(links()) == 1, "one replica is left")
        assert links().keys() <= before.keys()
    await removed(backend, "sim")
