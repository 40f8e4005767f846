"""The listeners of a gateway process: their addresses, connection limits and TLS, and the gRPC servers behind them."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from cluster import http2
from cluster.config.gateway import GatewaySettings
from cluster.config.schema import Config
from cluster.gateway.apis.admin.authorization import AdminAuthorizer, AdminMethod
from cluster.gateway.apis.admin.fleet import NoLedger
from cluster.gateway.apis.grpc.inference import SERVICE, InferenceApi
from cluster.gateway.apis.http.server import HttpServer
from cluster.gateway.auth.tls import NewestContext
from cluster.gateway.call_service import CallService
from cluster.gateway.links.listener import bind_failure
from cluster.gateway.models.directory import ModelDirectory
from cluster.policy.limits.request_bytes import ByteBounds, RequestBytes
from cluster.process.descriptors import raise_descriptor_limit

if TYPE_CHECKING:
    from cluster.gateway.auth.tenants import TenantAuthenticator

ADMIN_MESSAGE_BYTES, ADMIN_CALLS = 1 << 20, 256
ADMIN_BOUNDS = ByteBounds(connection=4 << 20, tenant=16 << 20, process=32 << 20)


class Listeners:
    """The open servers, keyed by the names of their addresses in `gateway.listen`. Each server's limit on connections
    is a share of the process's limit on file descriptors."""

    def __init__(self) -> None:
        self._connections = http2.ConnectionTable.for_descriptors(raise_descriptor_limit())
        self._notices = http2.LimitedLog()
        self.servers: dict[str, http2.Server | HttpServer] = {}
        self.endpoints: dict[str, str] = {}
        """Bound addresses (host:port) by listener name."""

    def admission(self, port: http2.Port) -> http2.ConnectionAdmission:
        """Return the connection limits of a port."""
        return http2.ConnectionAdmission(self._connections.pools[port], self._notices)

    async def open(
        self,
        name: str,
        address: str,
        server: http2.Server | HttpServer,
        tls: NewestContext | None = None,
        *,
        shared: bool = False,
        listener: socket.socket | None = None,
    ) -> None:
        """Bind an address and serve. `shared`: whether other processes listen on the address too. `listener`: a socket
        that is bound to the address already. Raises RuntimeError when the address cannot be bound."""
        host, port = address.rsplit(":", 1)
        host = host.strip("[]")
        try:
            if listener is not None and isinstance(server, http2.Server):
                bound = await server.serve(listener, tls)
            else:
                bound = await server.start(host, int(port), tls, shared=shared)
        except OSError as error:
            raise RuntimeError(bind_failure(name, address, error)) from None
        self.servers[name] = server
        self.endpoints[name] = f"{host}:{bound}"

    async def close(self, *names: str) -> None:
        """Stop servers at once. Servers that have not been opened are ignored."""
        for name in names:
            if name in self.servers:
                await self.servers[name].stop(0)


def client_server(
    settings: GatewaySettings,
    service: CallService,
    servicer: health.aio.HealthServicer,
    admission: http2.ConnectionAdmission,
    request_bytes: RequestBytes,
) -> http2.Server:
    """Return the server of the client port: inference, health and reflection."""
    limits = http2.ServerLimits(
        max_message_bytes=settings.max_message_bytes,
        age_s=settings.max_connection_age_s,
        age_grace_s=max(settings.drain_timeout_s, 1.0),
    )
    inference = InferenceApi(service, settings.max_connection_age_s * 0.9)
    server = http2.Server(limits, admission, inference, request_bytes)
    server.add_generic_rpc_handlers((inference.handlers(),))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)  # type: ignore[arg-type]
    _add_reflection(server, (SERVICE, health.SERVICE_NAME))
    return server


def admin_server(
    authorizer: AdminAuthorizer, methods: Mapping[str, AdminMethod], admission: http2.ConnectionAdmission
) -> http2.Server:
    """Return the server of the admin port."""
    limits = http2.ServerLimits(max_message_bytes=ADMIN_MESSAGE_BYTES, max_calls=ADMIN_CALLS)
    server = http2.Server(limits, admission, authorizer, RequestBytes(ADMIN_BOUNDS, time.monotonic))
    server.add_generic_rpc_handlers(authorizer.handlers(methods.values()))
    names = {method.descriptor.containing_service.full_name: None for method in methods.values()}
    _add_reflection(server, list(names))
    return server


def _add_reflection(server: http2.Server, names: Sequence[str]) -> None:
    reflections = reflection.aio.ReflectionServicer((*names, reflection.SERVICE_NAME))
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflections, server)  # type: ignore[no-untyped-call]


def ledger_services(
    config: Config, tenants: TenantAuthenticator | None, authorizer: AdminAuthorizer, directory: ModelDirectory
) -> dict[str, object]:
    """Return the services that read and change the ledger. If `tenants` is None, these services refuse all methods."""
    if tenants is None:
        return dict.fromkeys(("Tenants", "Keys", "Usage", "Audit"), NoLedger())
    from cluster.gateway.apis.admin.ledger import (
        AuditAdmin,
        KeysAdmin,
        TenantsAdmin,
        TenantServices,
        UsageAdmin,
        objectives_of,
    )

    shared = TenantServices(config, tenants, authorizer)
    return {
        "Tenants": TenantsAdmin(shared),
        "Keys": KeysAdmin(shared),
        "Usage": UsageAdmin(shared, lambda: objectives_of(directory.models)),
        "Audit": AuditAdmin(shared),
    }
