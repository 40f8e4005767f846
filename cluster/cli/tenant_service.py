"""Choose where a command's tenant service and usage reports come from: the database, or a gateway's admin API.

--database-url, -f and --pepper-file select the database. --admin, --endpoint, --context, --api-key-file and --tls-ca
select a gateway's admin API. Options on the command line take precedence over environment variables, and environment
variables over the current context. If none of these is given, the local ledger is used.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from cluster.cli.common import USAGE, fail, rpc_errors, warn
from cluster.cli.ledger import (
    ConfigOption,
    PepperOption,
    UrlOption,
    configured_slos,
    ledger_errors,
    open_ledger,
    read_settings,
)
from cluster.cli.shared_options import Command, with_options
from cluster.cli.target.access import admin_access
from cluster.cli.target.contexts import ClusterTarget
from cluster.cli.target.target_options import ADMIN_OPTIONS, target_of, typed_names
from cluster.ledger.tenants.service import Actor, LedgerTenantService, TenantService
from cluster.ledger.usage.reports import LedgerUsageReports, UsageReports
from cluster.process.user import user_name

DATABASE_OPTIONS = {"file": "-f", "database_url": "--database-url", "pepper_file": "--pepper-file"}
GATEWAY_OPTIONS = {
    "admin": "--admin",
    "endpoint": "--endpoint",
    "api_key_file": "--api-key-file",
    "tls_ca": "--tls-ca",
    "context_name": "--context",
}
_OPTIONS: dict[str, Any] = {
    "file": ConfigOption,
    "database_url": UrlOption,
    "pepper_file": PepperOption,
    **ADMIN_OPTIONS,
}


@dataclass(frozen=True, slots=True)
class TenantBackend:
    """The command-line options that select a ledger: the database, or the gateway through which to reach it.

    `typed`: names of the options that the user gave on the command line. `target`: returns the cluster whose gateway is
    used.
    """

    typed: frozenset[str]
    target: Callable[[], ClusterTarget]
    file: Path | None = None
    database_url: str | None = None
    pepper_file: Path | None = None


@dataclass(frozen=True, slots=True)
class LedgerServices:
    """The tenant service and the usage reports of one ledger, through its database or through a gateway's admin API."""

    tenants: TenantService
    reports: UsageReports


def with_tenant_service(*, keys: bool = False) -> Callable[[Command], Command]:
    """Return a decorator that passes an open tenant service to a command, as the argument `service`.

    The decorator also adds the options that select the service. `keys`: whether the command creates keys. Creating keys
    needs the pepper if the service uses the database.
    """
    return _with_one("service", lambda services: services.tenants, keys=keys)


def with_usage_reports() -> Callable[[Command], Command]:
    """Return a decorator that passes the usage reports to a command, as the argument `reports`.

    The decorator also adds the options that select the ledger of the reports.
    """
    return _with_one("reports", lambda services: services.reports, keys=False)


def _with_one(argument: str, choose: Callable[[LedgerServices], object], *, keys: bool) -> Callable[[Command], Command]:
    options = {name: kind for name, kind in _OPTIONS.items() if keys or name != "pepper_file"}

    @contextlib.contextmanager
    def opened(ctx: typer.Context, given: Mapping[str, Any]) -> Iterator[object]:
        database = {name: given.get(name) for name in DATABASE_OPTIONS}
        where = TenantBackend(typed_names(ctx, options), lambda: target_of(ctx), **database)
        with open_ledger_services(where, keys=keys) as services:
            yield choose(services)

    return with_options(argument, options, opened)


@contextlib.contextmanager
def open_ledger_services(where: TenantBackend, *, keys: bool = False) -> Iterator[LedgerServices]:
    """Open the services of a ledger. An error of a service ends the command with the exit code for that error."""
    if not _over_api(where):
        settings = read_settings(where.file, where.database_url, where.pepper_file)
        if settings.file_without_auth is not None:
            warn(
                f"{settings.file_without_auth} has no `auth`: this cluster's gateways check no keys and record no usage"
            )
        with open_ledger(settings, keys=keys) as ledger:
            by = Actor(f"cli:{user_name()}")
            yield LedgerServices(
                LedgerTenantService(
                    ledger,
                    by,
                    lambda event: ledger.audit.insert([event]),
                    settings.defaults.policy,
                    clock=time.time,
                ),
                LedgerUsageReports(ledger, rates=settings.rates, objectives=lambda: configured_slos(where.file)),
            )
        return
    from cluster.cli.remote_tenant_service import AdminConnection, RemoteTenantService, RemoteUsageReports

    access = admin_access(where.target())
    connection = AdminConnection(access)
    try:
        with rpc_errors(access.address, access.context), ledger_errors():
            yield LedgerServices(RemoteTenantService(connection), RemoteUsageReports(connection))
    finally:
        connection.close()


def _over_api(where: TenantBackend) -> bool:
    """Return whether the options select a gateway.

    Options for the database together with options for a gateway end the command with exit code 2.
    """
    database = [option for name, option in DATABASE_OPTIONS.items() if name in where.typed]
    gateway = [option for name, option in GATEWAY_OPTIONS.items() if name in where.typed]
    if database and gateway:
        fail(f"{database[0]} selects the database, {gateway[0]} a gateway: give one of them", USAGE)
    if database or gateway:
        return bool(gateway)
    return where.file is None and where.target().is_named
