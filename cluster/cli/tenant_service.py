"""Where the commands about tenants work: on the database itself, or over a gateway's admin API.

--database-url, -f and --pepper-file mean the database; --admin, --endpoint, --api-key-file and --tls-ca a gateway.
What is typed goes before what the environment says; with neither it is the local ledger.
"""

from __future__ import annotations

import contextlib
import getpass
import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import typer

from cluster.cli.access import reach
from cluster.cli.common import USAGE, AdminOption, ApiKeyOption, EndpointOption, TlsCaOption, fail, rpc_errors
from cluster.cli.ledger import ConfigOption, PepperOption, UrlOption, opened, settings, told
from cluster.ledger.tenants.service import By, LedgerTenantService, TenantService

HERE = {"file": "-f", "database_url": "--database-url", "pepper_file": "--pepper-file"}
THERE = {
    "admin": "--admin",
    "endpoint": "--endpoint",
    "api_key_file": "--api-key-file",
    "tls_ca": "--tls-ca",
}
_OPTIONS: dict[str, Any] = {
    "file": ConfigOption,
    "database_url": UrlOption,
    "pepper_file": PepperOption,
    "admin": AdminOption,
    "endpoint": EndpointOption,
    "api_key_file": ApiKeyOption,
    "tls_ca": TlsCaOption,
}


@dataclass(frozen=True, slots=True)
class TenantBackend:
    """A command's options of that kind; `typed` are those that the environment has not said."""

    typed: frozenset[str] = frozenset()

    file: Path | None = None
    database_url: str | None = None
    pepper_file: Path | None = None
    admin: str | None = None
    endpoint: str | None = None
    api_key_file: Path | None = None
    tls_ca: Path | None = None


def at_desk(*, keys: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command its parameter `desk`, and the options that say where that is; `keys`: it makes keys."""
    options = {name: kind for name, kind in _OPTIONS.items() if keys or name != "pepper_file"}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        own = [
            one.replace(annotation=hints[name])
            for name, one in inspect.signature(command).parameters.items()
            if name != "desk"
        ]
        positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
        more = [inspect.Parameter("context", positional, annotation=typer.Context)]
        more += [inspect.Parameter(name, positional, default=None, annotation=kind) for name, kind in options.items()]

        def run(context: typer.Context, **given: Any) -> None:
            typed = frozenset(name for name in options if _is_typed(context, name))
            where = TenantBackend(typed, **{name: given.pop(name) for name in options})
            with open_desk(where, keys=keys) as desk:
                command(desk=desk, **given)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature([more[0], *own, *more[1:]])  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in (*own, *more)}
        return run

    return decorate


@contextlib.contextmanager
def open_desk(where: TenantBackend, *, keys: bool = False) -> Iterator[TenantService]:
    """The desk; what it refuses ends the command with its exit code."""
    if not _over_api(where):
        chosen = settings(where.file, where.database_url, where.pepper_file)
        with opened(chosen, keys=keys) as ledger:
            by = By(f"cli:{getpass.getuser()}")
            yield LedgerTenantService(
                ledger,
                by,
                lambda event: ledger.audit.insert([event]),
                chosen.defaults.policy,
                clock=time.time,
                rates=chosen.rates,
            )
        return
    from cluster.cli.remote_tenant_service import RemoteTenantService

    access = reach(where.endpoint, where.admin, where.api_key_file, where.tls_ca)
    desk = RemoteTenantService(access)
    try:
        with rpc_errors(access.address), told():
            yield desk
    finally:
        desk.close()


def _is_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _over_api(where: TenantBackend) -> bool:
    here = [option for name, option in HERE.items() if name in where.typed]
    there = [option for name, option in THERE.items() if name in where.typed]
    if here and there:
        fail(f"{here[0]} works on the database, {there[0]} over a gateway: give one of them", USAGE)
    if here or there:
        return bool(there)
    return where.file is None and where.endpoint is not None
