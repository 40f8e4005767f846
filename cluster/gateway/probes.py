"""The grpc.health.v1 service: the statuses of models, and a server without TLS for the health probes of a pod. This
server has its own port and its own connection limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cluster import http2
from cluster.api.types import ModelState
from cluster.process.descriptors import raise_descriptor_limit

if TYPE_CHECKING:
    from cluster.gateway.models.known_model import KnownModel

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
LIMITS = http2.ServerLimits(max_message_bytes=1 << 16, max_calls=16)


def probe_server(servicer: health.aio.HealthServicer, admission: http2.ConnectionAdmission) -> http2.Server:
    """Return a server for the health service. The caller must start the server."""
    server = http2.Server(LIMITS, admission)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)  # type: ignore[arg-type]
    return server


@asynccontextmanager
async def health_served(host: str, port: int) -> AsyncIterator[None]:
    """Run a health service on a separate port, for a process that has no other server. The service reports SERVING.
    Raises OSError if the port cannot be bound."""
    table = http2.ConnectionTable.for_descriptors(raise_descriptor_limit())
    servicer = health.aio.HealthServicer()
    await servicer.set("", SERVING)
    server = probe_server(servicer, http2.ConnectionAdmission(table.pools[http2.Port.HEALTH]))
    await server.start(host, port)
    try:
        yield
    finally:
        await server.stop(0)


class ModelHealth:
    """The statuses in the health service: one for each name and alias of every model that was ever known."""

    def __init__(self) -> None:
        self.servicer = health.aio.HealthServicer()
        self.statuses: dict[str, int] = {}
        self._updates: set[asyncio.Task[None]] = set()

    def update(self, models: Iterable[KnownModel]) -> None:
        """Set the status of each model name and alias. Names that are no longer known become NOT_SERVING."""
        now = {
            name: SERVING if model.state is ModelState.READY else NOT_SERVING
            for model in models
            for name in (model.name, *model.entry.aliases)
        }
        for name, status in {**dict.fromkeys(self.statuses, NOT_SERVING), **now}.items():
            if self.statuses.get(name) != status:
                self.statuses[name] = status
                task = asyncio.create_task(self.servicer.set(name, status))
                self._updates.add(task)
                task.add_done_callback(self._updates.discard)
