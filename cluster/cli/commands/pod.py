"""`headrace pod gateway|controller`: the processes of a pod, one a container, as the chart starts them.

They differ from a host's processes in what surrounds them: nobody restarts them but Kubernetes, which asks a port of
its own how they are (grpc.health.v1 in plain text, since a kubelet's probe speaks no TLS), and of several controllers
one acts, by a Lease. What a pod lacks is said before anything starts; `--check` does no more than that.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli import terminal
from cluster.cli.base import USAGE, FileOption, fail, read_config, read_leniently
from cluster.cli.commands import pod_secrets
from cluster.cli.commands.processes import FolderOption, bound_link, run, stop_on_signal
from cluster.config.gateway import ClientTls, Tls, is_loopback
from cluster.config.lenient import Lenient, load_for_controller, load_for_gateway
from cluster.config.schema import Config, secret_files
from cluster.kube.api import ACCOUNT, KubeLease
from cluster.observe import log
from cluster.process import memory
from cluster.process.core_dumps import leave_no_core_dumps
from cluster.process.descriptors import raise_descriptor_limit
from cluster.process.private_files import make_private_folder
from cluster.ray.drain_time import TIMEOUT_ENV

app = typer.Typer(no_args_is_help=True, help="The processes of a Kubernetes pod.")
app.command("secrets")(pod_secrets.pod_secrets)
app.command("certificates")(pod_secrets.pod_certificates)
HealthOption = Annotated[
    str, typer.Option("--health", help="host:port on which grpc.health.v1 is answered in plain text, for probes.")
]
CheckOption = Annotated[bool, typer.Option("--check", help="Only say whether configuration and files serve.")]


@app.command()
def gateway(file: FileOption, folder: FolderOption, health: HealthOption = "", check: CheckOption = False) -> None:
    """Run one gateway."""
    found = _read(file, check, load_for_gateway)
    config = found.config
    _end_with(gateway_lacks(config), file, check)
    log.configure(config.observe.log_level, cluster=config.name, part="gateway")
    leave_no_core_dumps()
    link = bound_link(config)
    from cluster.gateway.config_state import ConfigState
    from cluster.gateway.server import run_gateway

    def ready(_: dict[str, str]) -> None:
        memory.settle()

    async def serve() -> None:
        state = ConfigState(file, found.problems)
        await run_gateway(
            config, folder=folder, stop=stop_on_signal(), ready=ready, probes=health, link=link, config_state=state
        )

    run(serve())


@app.command()
def controller(
    file: FileOption,
    folder: FolderOption,
    health: HealthOption = "",
    lease: Annotated[
        str, typer.Option("--lease", help="Act only while holding the Lease of this name, in the pod's namespace.")
    ] = "",
    check: CheckOption = False,
) -> None:
    """Run one controller. Replicas go on when it ends."""
    found = _read(file, check, load_for_controller)
    config = found.config
    _end_with(controller_lacks(config), file, check)
    log.configure(config.observe.log_level, cluster=config.name, part="controller")
    raise_descriptor_limit()
    make_private_folder(folder)

    async def serve() -> None:
        async with probed(health):
            await control(config, folder, lease, stop_on_signal(), found=found)

    run(serve())


@app.command()
def drain(
    timeout_s: Annotated[
        float, typer.Option("--timeout-s", envvar=TIMEOUT_ENV, help="Within this time the node has to end.", min=0.0)
    ] = 30.0,
) -> None:
    """Drain the Ray node of this pod, and wait until it has ended: the preStop hook of Ray's worker pods. Replicas take
    no new work; what runs ends or goes on at others."""
    from cluster.ray.node_drain import drain_here

    try:
        ended = drain_here(timeout_s)
    except (RuntimeError, ConnectionError) as error:
        fail(str(error))
    if not ended:
        fail(f"the Ray node has not ended within {timeout_s:g} s")


async def control(
    config: Config,
    folder: Path,
    lease: str,
    stop: asyncio.Event,
    account: Path = ACCOUNT,
    *,
    found: Lenient | None = None,
) -> None:
    """Be the controller until `stop`; with the name of a Lease only while this pod holds it. `account` is where the
    pod's service account lies, `found` what was wrong in the file. Raises ValueError outside a pod."""
    from cluster.controller.controller import run_controller

    me = socket.gethostname()  # the pod's name

    async def act(until: asyncio.Event) -> None:
        await run_controller(
            config,
            instance=me,
            ray_address=None,
            gateways=config.link.gateways,
            run_folder=folder,
            stop=until,
            found=found,
        )

    if not lease:
        await act(stop)
        return
    from cluster.kube.leading import Leader, StoodStill
    from cluster.kube.lease import LeaseTerms

    terms = LeaseTerms()
    try:
        await Leader(KubeLease.of_this_pod(lease, terms.lease_s, account), me, terms).run(act, stop)
    except StoodStill as error:
        raise RuntimeError(str(error)) from None


@contextlib.asynccontextmanager
async def probed(address: str) -> AsyncIterator[None]:
    """grpc.health.v1 answers SERVING there for as long as this event loop turns. "" is nowhere."""
    if not address:
        yield
        return
    from cluster.gateway.probes import health_served

    host, _, port = address.rpartition(":")
    async with health_served(host.strip("[]"), int(port)):
        yield


# ---- what a pod lacks


def _read(file: Path, check: bool, lenient: Callable[[Path], Lenient]) -> Lenient:
    """What a process starts with; where it is only to be checked, wrong models are refused too."""
    found = Lenient(read_config(file)) if check else read_leniently(file, lenient)
    config = found.config
    if config.gateway.processes != 1:
        fail(f"{file}: gateway.processes: a container holds one process: set 1, and more replicas", USAGE)
    return found


def _end_with(lacks: Iterator[str], file: Path, check: bool) -> None:
    found = [f"{file}: {one}" for one in lacks]
    if found:
        fail("\n".join(found), USAGE)
    if check:
        terminal.say(f"{file}: right, and every file that it names is here")
        raise typer.Exit(0)


def gateway_lacks(config: Config, *, pod: bool = True, files: bool = True) -> Iterator[str]:
    """Why this file does not serve as a gateway's, one sentence each: in a pod (`pod`), and for want of a file that it
    names (`files`)."""
    if pod:
        yield from _unreachable(config)
    if files:
        yield from _unreadable("gateway.tls", config.gateway.tls)
        yield from _unreadable("gateway.link_tls", config.gateway.link_tls)
        for setting, path in secret_files(config).items():
            yield from unreadable_file(setting, path)
        if config.observe.budget_webhook is not None:
            path = config.observe.budget_webhook.secret_file
            yield from unreadable_file("observe.budget_webhook.secret_file", path)


def _unreachable(config: Config) -> Iterator[str]:
    for name, address in config.gateway.listen.model_dump().items():
        if is_loopback(address):
            yield f"gateway.listen.{name}: {address} is reached by nobody outside this pod: listen on 0.0.0.0"
        elif address.endswith(":0"):
            yield f"gateway.listen.{name}: {address}: a pod's ports are declared before it starts: name one"
    if not config.store.database_url and config.auth is not None:
        yield "store.database_url: a pod's own SQLite is seen by no other gateway: name a PostgreSQL"


def controller_lacks(config: Config, *, pod: bool = True, files: bool = True) -> Iterator[str]:
    """The same of a controller's."""
    if pod and not config.ray:
        yield "ray: empty: a controller in a pod has no Ray of its own: name the cluster's dashboard"
    if pod and not config.link.gateways:
        yield "link.gateways: empty: there is nobody to dial"
    if pod and config.link.tls is None:
        yield "link.tls: not set: the gateways' link port wants a certificate"
    if files:
        yield from _unreadable("link.tls", config.link.tls)
        for cluster in config.ray:
            if cluster.token_file is not None:
                yield from unreadable_file(f"ray[{cluster.name}].token_file", cluster.token_file)


def _unreadable(setting: str, tls: Tls | ClientTls | None) -> Iterator[str]:
    for name, path in tls.model_dump().items() if tls is not None else ():
        if path is not None:
            yield from unreadable_file(f"{setting}.{name}", path, may_be_empty=name == "revoked_serials_file")


def unreadable_file(setting: str, path: Path, *, may_be_empty: bool = False) -> Iterator[str]:
    """Why a file that a setting names cannot be used, if it cannot."""
    try:
        if not path.read_bytes().strip() and not may_be_empty:
            yield f"{setting}: {path} is empty"
    except OSError as error:
        yield f"{setting}: {path} cannot be read: {error.strerror}"
