"""Silence of a controller: how long ago its last message arrived."""

from __future__ import annotations

import asyncio
from pathlib import Path

from cluster.api.types import CatalogEntry
from cluster.controller.links import ControllerLinks
from tests.support.cluster import running_cluster, until


async def test_an_idle_controller_is_not_silent(tmp_path: Path) -> None:
    """A controller whose catalog does not change still sends messages regularly, on the same stream."""
    async with running_cluster(tmp_path) as cluster:
        controller, gateways = cluster.gateway.hub.controller, [cluster.gateway.endpoints["link"]]
        links = ControllerLinks(controller_id="c", gateways=gateways, tls=None, bundles=lambda _: None, idle_s=0.02)
        running = asyncio.create_task(links.run())
        try:
            await until(lambda: controller.connected, "the controller is linked")
            assert controller.heard_at is None, "no catalog came yet"
            links.publish([CatalogEntry("m")])
            await until(lambda: controller.heard_at is not None, "the catalog came")
            stream = controller._stream
            times = set[float | None]()

            def heard_again() -> bool:
                times.add(controller.heard_at)
                return len(times) > 3

            await until(heard_again, "the controller is heard again and again")
            assert controller._stream is stream
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
