"""Fetches of tokenizer bundles. A fetch has one source at a time and survives the loss of the source."""

from __future__ import annotations

import asyncio

import pytest

from cluster.api.types import EngineInfo, WorkerIdentity
from cluster.gateway.links.bundle_fetches import BundleFetches
from cluster.gateway.links.liveness import LinkLiveness
from cluster.gateway.links.worker_link import WorkerLink
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.bundle import Bundle
from tests.support.links import NoListener

BUNDLE = Bundle({"tokenizer.json": b"{}"})
KEY = f"bundle:{BUNDLE.digest}"


class Sources:
    """The sources of bundles: workers in order of preference, then a controller."""

    def __init__(self, workers: int, controller: bool) -> None:
        info = EngineInfo("sim", "sim", "1", 16, 1024, 32, 64, 4096, 1000)
        self.links = [
            WorkerLink(WorkerIdentity(f"w{i}", "i", "m"), info, 1, NoListener(), LinkLiveness(0.0, 1.0, 1.0))
            for i in range(workers)
        ]
        self.controller = controller
        self.controller_requests: list[str] = []
        self.fetches = BundleFetches(lambda digest: self.links[0] if self.links else None, self.request)

    def request(self, digest: str) -> bool:
        """Record a request to the controller. Returns whether there is a controller."""
        self.controller_requests.append(digest)
        return self.controller

    def lose_worker(self) -> None:
        """End the link of the preferred worker."""
        self.links.pop(0).end("lost")
        self.fetches.request_again()

    async def begin(self) -> asyncio.Task[Bundle]:
        """Begin to fetch the bundle."""
        task = asyncio.create_task(self.fetches.fetch(BUNDLE.digest, 5))
        await asyncio.sleep(0)
        return task


async def test_a_lost_source_is_replaced() -> None:
    """A bundle is requested from a worker. If the link of this worker ends, the bundle is requested from the next
    worker, and after the last worker from the controller."""
    sources = Sources(2, controller=True)
    first, second = sources.links
    task = await sources.begin()
    assert (await first.box.next_message()).fetch_bundle.digest == BUNDLE.digest
    sources.fetches.request_again()
    sources.lose_worker()
    assert (await second.box.next_message()).fetch_bundle.digest == BUNDLE.digest
    assert sources.controller_requests == []
    sources.lose_worker()
    assert sources.controller_requests == [BUNDLE.digest]
    sources.fetches.receive({}, pb.Blob(key=KEY, data=BUNDLE.pack(), last=True))
    assert (await task).files == BUNDLE.files


async def test_one_request_serves_all_tasks() -> None:
    """Two tasks that need the same bundle cause one request, and blobs of an unknown bundle are ignored."""
    sources = Sources(0, controller=True)
    tasks = [await sources.begin(), await sources.begin()]
    parts: dict[str, bytearray] = {}
    data = BUNDLE.pack()
    sources.fetches.receive(parts, pb.Blob(key="bundle:sha256:unknown", data=data))
    sources.fetches.receive(parts, pb.Blob(key=KEY, data=data[:10]))
    assert set(parts) == {KEY}
    sources.fetches.receive(parts, pb.Blob(key=KEY, data=data[10:], last=True))
    assert {bundle.digest for bundle in await asyncio.gather(*tasks)} == {BUNDLE.digest}
    assert len(sources.controller_requests) == 1


async def test_without_a_source() -> None:
    """A fetch fails at once if neither a worker nor the controller is connected."""
    with pytest.raises(LookupError, match="neither the controller nor a worker"):
        await Sources(0, controller=False).fetches.fetch(BUNDLE.digest)
