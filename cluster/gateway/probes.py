"""The grpc.health.v1 service without TLS, for the probes of a pod. The service has a separate port with separate
connection limits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cluster import http2
from cluster.process.descriptors import raise_descriptor_limit

LIMITS = http2.ServerLimits(max_message_bytes=1 << 16, max_calls=16)


def probe_server(servicer: health.aio.HealthServicer, admission: http2.ConnectionAdmission) -> http2.Server:
    """Return a server for the health service. The caller must start the server."""
    server = http2.Server(LIMITS, admission)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)  # type: ignore[arg-type]
    return server


@asynccontextmanager
async def health_served(host: str, port: int) -> AsyncIterator[None]:
    """Report SERVING while this event loop runs, for a process that has no other server. Raises OSError."""
    table = http2.ConnectionTable.for_descriptors(raise_descriptor_limit())
    servicer = health.aio.HealthServicer()
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    server = probe_server(servicer, http2.ConnectionAdmission(table.pools[http2.Port.HEALTH]))
    await server.start(host, port)
    try:
        yield
    finally:
        await server.stop(0)
