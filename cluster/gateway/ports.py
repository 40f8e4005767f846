"""The servers of a gateway process at its ports."""

from __future__ import annotations

import socket

from cluster import http2
from cluster.config.schema import Config
from cluster.gateway.administration import Administration
from cluster.gateway.apis.grpc.inference import SERVICE
from cluster.gateway.apis.http.body import RequestBodies
from cluster.gateway.apis.http.host_names import HostNames
from cluster.gateway.apis.http.server import HttpServer
from cluster.gateway.apis.http_application import http_application
from cluster.gateway.auth.tls import NewestContext
from cluster.gateway.call_service import CallService
from cluster.gateway.foundation import Foundation
from cluster.gateway.links.hub import Hub, hub_server
from cluster.gateway.listeners import Listeners, admin_server, client_server
from cluster.gateway.metrics_page import MetricsPage
from cluster.gateway.probes import SERVING, ModelHealth, probe_server
from cluster.policy.limits.request_bytes import RequestBytes


class GatewayPorts:
    """The servers of a gateway process. `clients` (gRPC) and `http` serve callers; `links` serves workers and
    controllers. The servers for operators are made when their ports are opened."""

    def __init__(
        self,
        foundation: Foundation,
        service: CallService,
        hub: Hub,
        health: ModelHealth,
        administration: Administration,
        request_bytes: RequestBytes,
    ) -> None:
        settings, console = foundation.config.gateway, administration.console
        self._config: Config = foundation.config
        self._process = foundation.process
        names = (
            None
            if foundation.config.auth is not None
            else HostNames((*settings.host_names, settings.console.public_host))
        )
        self._metrics_page = MetricsPage(foundation.metrics, names)
        self._health = health
        self._administration = administration
        self.listeners = Listeners()
        admission = self.listeners.admission
        self.clients: http2.Server = client_server(
            settings, service, health.servicer, admission(http2.Port.CLIENT), request_bytes
        )
        self.links: http2.Server = hub_server(hub, admission(http2.Port.LINK))
        if administration.siblings is not None:
            self.links.add_generic_rpc_handlers((administration.siblings.handler(),))
        bodies = RequestBodies(settings.max_message_bytes, request_bytes)
        endpoints = {} if console is None else console.endpoints()
        self.http = HttpServer(http_application(service, bodies, endpoints, names), admission(http2.Port.CLIENT))

    async def open_internal(self, probes: str, link: socket.socket | None) -> None:
        """Open the ports for the cluster and its operators: health probes, links, admin (process 0 only) and metrics.

        `probes`: address of the health probes, "" for none. `link`: a socket for links that is bound already; None to
        bind one. Raises RuntimeError when an address cannot be bound.
        """
        settings, listeners = self._config.gateway, self.listeners
        listen = settings.listen.of(self._process)
        if probes:
            server = probe_server(self._health.servicer, listeners.admission(http2.Port.HEALTH))
            await listeners.open("health", probes, server)
        files = settings.link_tls
        link_tls = None if files is None else NewestContext.of_link(files)
        await listeners.open("link", listen.link, self.links, link_tls, listener=link)
        if not self._process:
            authorizer, methods = self._administration.authorizer, self._administration.methods
            admin = admin_server(authorizer, methods, listeners.admission(http2.Port.ADMIN))
            await listeners.open("admin", listen.admin, admin, self._tls("h2"))
        metrics = HttpServer(self._metrics_page, listeners.admission(http2.Port.METRICS))
        await listeners.open("metrics", listen.metrics, metrics)

    async def open_clients(self) -> None:
        """Open the ports for callers, and report this gateway as healthy. Raises RuntimeError when an address cannot be
        bound."""
        settings = self._config.gateway
        listen, shared = settings.listen.of(self._process), settings.processes > 1
        await self.listeners.open("grpc", listen.grpc, self.clients, self._tls("h2"), shared=shared)
        await self.listeners.open("http", listen.http, self.http, self._tls("http/1.1"), shared=shared)
        await self._health.servicer.set("", SERVING)
        await self._health.servicer.set(SERVICE, SERVING)

    def _tls(self, protocol: str) -> NewestContext | None:
        files = self._config.gateway.tls
        return None if files is None else NewestContext.of(files, protocol)
