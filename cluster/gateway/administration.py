"""The parts of a gateway for the people who operate the cluster: the admin API and the console."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from cluster.gateway import optional_parts
from cluster.gateway.apis.admin.authorization import AdminAuthorizer, AdminMethod
from cluster.gateway.apis.admin.fleet import CatalogAdmin, FleetAdmin
from cluster.gateway.apis.admin.forwarding import ForwardedVerbs
from cluster.gateway.apis.admin.methods import admin_methods
from cluster.gateway.apis.admin.routes import RememberedRoutes, RouteExplainer
from cluster.gateway.call_service import CallService
from cluster.gateway.console.build import Sources, live_overview
from cluster.gateway.console.overview.live import LiveOverview
from cluster.gateway.dispatch import Dispatch
from cluster.gateway.foundation import Foundation
from cluster.gateway.listeners import ledger_services
from cluster.policy.limits.budgets import BudgetUse
from cluster.policy.limits.request_bytes import RequestBytes
from cluster.policy.problems import Problem

if TYPE_CHECKING:
    from cluster.gateway.apis.admin.siblings import Siblings
    from cluster.gateway.console.app import ConsoleApp


class Administration:
    """The admin methods, the live overview and the console of one gateway process. Every process has the admin methods,
    because its console uses them. Only process 0 has the admin port."""

    def __init__(
        self,
        foundation: Foundation,
        dispatch: Dispatch,
        service: CallService,
        request_bytes: RequestBytes,
        utilization: Callable[[], Iterator[tuple[str, str, float]]],
        budgets: Callable[[], Sequence[BudgetUse]],
        problems: Callable[[], Sequence[Problem]],
    ) -> None:
        """`utilization`: yields how much of each limit each tenant has used. `budgets`: returns how much of each budget
        each tenant has used. `problems`: returns the present problems. Raises ValueError if a file of
        the console cannot be used."""
        config, tenants = foundation.config, foundation.tenants
        remembered = RememberedRoutes(dispatch.scheduler.routes.history, foundation.gateway_id)
        self.siblings: Siblings | None = optional_parts.siblings(
            config, foundation.process, tenants, service.abort, remembered
        )
        self.live: LiveOverview = live_overview(
            Sources(
                config,
                foundation.process,
                dispatch.hub,
                dispatch.worker_events,
                dispatch.directory,
                dispatch.scheduler,
                service,
                foundation.metrics,
                tenants,
                dispatch.accounting,
                utilization,
                budgets,
                problems,
                self.siblings,
            )
        )
        """The cluster's state, as the console shows it."""
        self.authorizer = AdminAuthorizer(tenants)
        services: dict[str, object] = {
            "Fleet": FleetAdmin(
                dispatch.hub,
                service,
                self.authorizer,
                RouteExplainer(remembered, self.siblings),
                self.live,
                self.siblings,
            ),
            "Catalog": CatalogAdmin(dispatch.hub, dispatch.directory, dispatch.scheduler),
            **ledger_services(config, tenants, self.authorizer, dispatch.directory),
        }
        self.methods: Mapping[str, AdminMethod] = admin_methods(services, ForwardedVerbs(dispatch.hub, self.authorizer))
        self.console: ConsoleApp | None = optional_parts.console(
            config, tenants, service, self.methods, self.authorizer, request_bytes, foundation.metrics, self.live
        )
