"""Test of a changed catalog entry: all replicas are replaced while streams run. Ray and the gateway are real, the
engines are simulated."""

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

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.thorough]


async def test_a_changed_entry_cuts_no_stream(backend: ChildBackend, tmp_path: Path) -> None:
    """While the model's version changes, no call ends early: the streams that run on the two replicas and the calls
    that begin during the change are complete. In the end only replicas of the new version serve."""
    checkpoint = build_checkpoint("llama", tmp_path / "llama")
    async with running_cluster(tmp_path / "gateway") as cluster:
        address = cluster.gateway.endpoints["link"]
        links = ControllerLinks(controller_id="test", gateways=[address], tls=None, bundles=lambda _: None)
        controller = Controller(backend, links)
        first = sim(checkpoint, address, 2)
        controller.models.want([first])
        tasks = [asyncio.create_task(links.run()), asyncio.create_task(controller.run())]

        def versions() -> list[str]:
            return [link.identity.version for link in cluster.gateway.hub.links]

        try:
            await until(lambda: versions() == [first.spec.version] * 2, "both replicas have dialled in", 240)
            await until(lambda: all(link.free.sequences for link in cluster.gateway.hub.links), "both have room")
            request = chat(max_tokens=1200, ignore_eos=True)
            streams = [cluster.stub.StreamChat(request) for _ in range(4)]
            begun = [await stream.read() for stream in streams]
            assert sorted(link.running for link in cluster.gateway.hub.links) == [2, 2]

            changed = dataclasses.replace(first, spec=dataclasses.replace(first.spec, version="v2"))
            controller.models.want([changed])
            rests = [asyncio.ensure_future(rest_of(stream)) for stream in streams]
            short, answers = chat(max_tokens=20, ignore_eos=True), []
            while versions() != ["v2"] * 2 or not all(rest.done() for rest in rests):
                answers.append(await cluster.stub.Chat(short, timeout=60))
            ended = [[first_chunk, *await rest] for first_chunk, rest in zip(begun, rests, strict=True)]
            whole = [chunk async for chunk in cluster.stub.StreamChat(request)]
            assert [text_of(chunks) for chunks in ended] == [text_of(whole)] * 4
            texts = {answer.choices[0].message.content for answer in answers}
            assert len(texts) == 1, "calls that began meanwhile have different texts"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    await removed(backend, "sim")
