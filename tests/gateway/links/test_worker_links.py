"""Links of a worker that reconnects."""

from __future__ import annotations

import asyncio

import grpc

from cluster.api.types import EngineInfo, WorkerIdentity
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.links.worker_links import WorkerLinks
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.dial import Timing
from tests.support.serving import Door


class Connection:
    """A worker's connection, whose messages a test sends."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[object] = asyncio.Queue()

    async def read(self) -> object:
        """Return the next message."""
        return await self.messages.get()

    async def write(self, message: object) -> None:
        """Ignore a message to the worker."""


class Listener(Door):
    """A listener that records the incarnations of the links whose KV blocks were reported."""

    def __init__(self) -> None:
        super().__init__()
        self.reported: asyncio.Queue[str] = asyncio.Queue()

    def kv_blocks(self, link: WorkerLink, message: pb.KvBlocks) -> None:
        """Record the link's incarnation."""
        self.reported.put_nowait(link.identity.incarnation)


async def test_a_link_that_was_replaced_reports_nothing_more() -> None:
    """A message that an earlier connection of a worker has sent is not applied once the worker has reconnected. Its KV
    blocks would count as those of the new engine, which does not have them."""
    listener = Listener()
    links = WorkerLinks(listener, Timing(), lambda: None)
    info = EngineInfo("sim", "sim", "1", 16, 100, 8, 2048, 2048, 1000)
    blocks = pb.WorkerTurn(kv_blocks=pb.KvBlocks(is_reset=True))
    serving, connections = [], []
    for epoch, incarnation in enumerate(("first", "second"), 1):
        connection, identity = Connection(), WorkerIdentity("w", incarnation, "m")
        serving.append(asyncio.create_task(links.serve(identity, info, epoch, connection, pb.Welcome())))
        connections.append(connection)
        for each in connections:  # the second time, the first link's is read in the pass in which the second begins
            each.messages.put_nowait(blocks)
        assert await listener.reported.get() == incarnation
    await serving[0]
    connections[1].messages.put_nowait(grpc.aio.EOF)
    await serving[1]
    assert listener.reported.empty()
