"""grpc.health.v1 in plain text, on a port of its own for the probes of a pod, within the caps of that port."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cluster import http2
from cluster.process.descriptors import raise_descriptor_limit

LIMITS = http2.ServerLimits(max_message_bytes=1 << 16, max_calls=16)


def probe_server(servicer: health.aio.HealthServicer, admission: http2.ConnectionAdmission) -> http2.Server:
    """A server of this health, for its owner to start."""
    server = http2.Server(LIMITS, admission)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)  # type: ignore[arg-type]
    return server


@asynccontextmanager
async def health_served(host: str, port: int) -> AsyncIterator[None]:
    """SERVING for as long as this event loop turns, of a process that serves nothing else. Raises OSError."""
    table = http2.ConnectionTable.for_descriptors(raise_descriptor_limit())
    servicer = health.aio.HealthServicer()
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    server = probe_server(servicer, http2.ConnectionAdmission(table.pools[http2.Port.HEALTH]))
    await server.start(host, port)
    try:
        yield
    finally:
        await server.stop(0)
