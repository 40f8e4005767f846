"""A changed catalog entry makes Serve replace every replica under running streams: real Ray, real gateway, simulated
engines."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

from cluster.controller.controller import Controller
from cluster.controller.links import ControllerLinks
from cluster.ray.backend import ChildBackend
from tests.ray.test_downscale import sim
from tests.support.calls import chat, rest_of, text_of
from tests.support.checkpoints import build_checkpoint
from tests.support.cluster import running_cluster, until
from tests.support.serving import removed

pytestmark = [pytest.mark.ray, pytest.mark.slow]


async def test_a_changed_entry_cuts_no_stream(backend: ChildBackend, tmp_path: Path) -> None:
    """The version changes while two replicas have two streams each: every one comes whole, on the old replica or moved,
    and so does every call that begins meanwhile; in the end the new version serves alone."""
    checkpoint = build_checkpoint("llama", tmp_path / "llama")
    async with running_cluster(tmp_path / "gateway") as cluster:
        address = cluster.gateway.endpoints["link"]
        end = ControllerLinks(controller_id="test", gateways=[address], tls=None, bundles=lambda _: None)
        controller = Controller(backend, end)
        first = sim(checkpoint, address, 2)
        controller.want([first])
        running = [asyncio.create_task(end.run()), asyncio.create_task(controller.run())]

        def versions() -> list[str]:
            return [link.identity.version for link in cluster.gateway.hub.links]

        try:
            await until(lambda: versions() == [first.spec.version] * 2, "both replicas have dialled in", 60)
            await until(lambda: all(one.free.sequences for one in cluster.gateway.hub.links), "both have room")
            request = chat(max_tokens=1200, ignore_eos=True)
            streams = [cluster.stub.StreamChat(request) for _ in range(4)]
            begun = [await stream.read() for stream in streams]
            assert sorted(link.running for link in cluster.gateway.hub.links) == [2, 2]

            changed = dataclasses.replace(first, spec=dataclasses.replace(first.spec, version="v2"))
            controller.want([changed])
            rests = [asyncio.ensure_future(rest_of(stream)) for stream in streams]
            short, told = chat(max_tokens=20, ignore_eos=True), []
            while versions() != ["v2"] * 2 or not all(rest.done() for rest in rests):
                told.append(await cluster.stub.Chat(short, timeout=60))
            ended = [[first_chunk, *await rest] for first_chunk, rest in zip(begun, rests, strict=True)]
            whole = [chunk async for chunk in cluster.stub.StreamChat(request)]
            assert [text_of(chunks) for chunks in ended] == [text_of(whole)] * 4
            assert len({one.choices[0].message.content for one in told}) == 1, "some of those that began meanwhile"
        finally:
            for part in running:
                part.cancel()
            await asyncio.gather(*running, return_exceptions=True)
    await removed(backend, "sim")
