"""Commands `headrace pod gateway|controller`: each runs the process of one container of a pod.

The chart runs these commands. Kubernetes restarts a process that has ended, and probes each process on a separate port.
The probes use grpc.health.v1 in plain text, because a kubelet's probe has no TLS. If there are several controllers,
only the holder of a Lease acts. Missing settings and files are reported before the process starts. With `--check`, the
commands only report.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli import terminal
from cluster.cli.base import USAGE, FileOption, fail, read_config, read_leniently
from cluster.cli.commands.run import pod_secrets
from cluster.cli.commands.run.processes import (
    FolderOption,
    bound_link,
    check_metrics_address,
    metrics_page,
    run,
    stop_on_signal,
)
from cluster.config.gateway import ClientTls, Tls, is_loopback
from cluster.config.lenient import PartialConfig, load_for_controller, load_for_gateway
from cluster.config.paths import secret_files
from cluster.config.schema import Config
from cluster.kube.api import ACCOUNT, KubeLease
from cluster.observe import log
from cluster.process import memory
from cluster.process.core_dumps import disable_core_dumps
from cluster.process.descriptors import raise_descriptor_limit
from cluster.process.place import place_fields
from cluster.process.private_files import make_private_folder
from cluster.ray.drain_time import TIMEOUT_ENV

if TYPE_CHECKING:
    from cluster.controller.controller_metrics import ControllerGauges
    from cluster.observe.metrics import Metrics

app = typer.Typer(no_args_is_help=True, help="Secrets for the chart, and the processes of its pods.")
app.command("secrets")(pod_secrets.pod_secrets)
app.command("certificates")(pod_secrets.pod_certificates)
HealthOption = Annotated[
    str, typer.Option("--health", help="host:port to serve grpc.health.v1 on in plain text, for probes.")
]
CheckOption = Annotated[bool, typer.Option("--check", help="Only check the configuration and its files.")]


@app.command()
def gateway(file: FileOption, folder: FolderOption, health: HealthOption = "", check: CheckOption = False) -> None:
    """Run one gateway."""
    loaded = _load(file, check, load_for_gateway)
    config = loaded.config
    _refuse_lacks(gateway_problems(config), file, check)
    log.configure(config.observe.log_level, {"cluster": config.name, "part": "gateway", **place_fields()})
    disable_core_dumps()
    link = bound_link(config)
    from cluster.gateway.config_state import ConfigState
    from cluster.gateway.server import run_gateway

    def ready(_: dict[str, str]) -> None:
        memory.freeze_objects()

    async def serve() -> None:
        state = ConfigState(file, loaded.problems)
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
    metrics: Annotated[str, typer.Option("--metrics", help="Serve metrics at HOST:PORT (by custom port 9401).")] = "",
) -> None:
    """Run one controller. Replicas keep running when it ends."""
    check_metrics_address(metrics)
    loaded = _load(file, check, load_for_controller)
    config = loaded.config
    _refuse_lacks(controller_problems(config), file, check)
    log.configure(config.observe.log_level, {"cluster": config.name, "part": "controller", **place_fields()})
    raise_descriptor_limit()
    make_private_folder(folder)

    from cluster.controller.controller_metrics import controller_metrics

    exported, gauges = controller_metrics(config)

    async def serve() -> None:
        async with probe_server(health), metrics_page(exported, metrics):
            await run_pod_controller(
                config, folder, lease, stop_on_signal(), loaded=loaded, metrics=exported, gauges=gauges
            )

    run(serve())


@app.command()
def drain(
    timeout_s: Annotated[
        float, typer.Option("--timeout-s", envvar=TIMEOUT_ENV, help="Seconds within which the node must end.", min=0.0)
    ] = 30.0,
) -> None:
    """Drain the Ray node of this pod, and wait until it has ended. This is the preStop hook of Ray's worker pods. The
    replicas of the node take no new work; running calls end there or are resumed by other replicas."""
    from cluster.ray.node_drain import drain_here

    try:
        ended = drain_here(timeout_s)
    except (RuntimeError, ConnectionError) as error:
        fail(str(error))
    if not ended:
        fail(f"the Ray node did not end within {timeout_s:g} s; raise --timeout-s ({TIMEOUT_ENV})")


async def run_pod_controller(
    config: Config,
    folder: Path,
    lease: str,
    stop: asyncio.Event,
    account: Path = ACCOUNT,
    *,
    loaded: PartialConfig | None = None,
    metrics: Metrics | None = None,
    gauges: ControllerGauges | None = None,
) -> None:
    """Run the controller until `stop` is set.

    If `lease` names a Lease, the controller runs only while this pod holds the Lease. `account` is the folder of the
    pod's service account. `loaded` is the result of reading the configuration file, with its invalid models. The
    metrics in `metrics` and `gauges` are updated while the controller runs. Raises ValueError if a Lease is named
    outside a pod.
    """
    from cluster.controller.process import run_controller

    me = socket.gethostname()  # the pod's name

    async def act(until: asyncio.Event) -> None:
        if gauges is not None:
            gauges.leads = True
        try:
            await run_controller(
                config,
                instance=me,
                ray_address=None,
                gateways=config.link.gateways,
                run_folder=folder,
                stop=until,
                metrics=metrics,
                found=loaded,
            )
        finally:
            if gauges is not None:
                gauges.leads = False

    if not lease:
        await act(stop)
        return
    from cluster.kube.leading import Leader, WorkNotStopped
    from cluster.kube.lease import LeaseTerms

    terms = LeaseTerms()
    try:
        await Leader(KubeLease.of_this_pod(lease, terms.lease_s, account), me, terms).run(act, stop)
    except WorkNotStopped as error:
        raise RuntimeError(str(error)) from None


@contextlib.asynccontextmanager
async def probe_server(address: str) -> AsyncIterator[None]:
    """Serve grpc.health.v1 at `address` (host:port). Does nothing if `address` is empty.

    The server answers SERVING while this event loop runs.
    """
    if not address:
        yield
        return
    from cluster.gateway.probes import health_served

    host, _, port = address.rpartition(":")
    async with health_served(host.strip("[]"), int(port)):
        yield


# ---- missing settings and files


def _load(file: Path, check: bool, lenient: Callable[[Path], PartialConfig]) -> PartialConfig:
    """Load the configuration. With `check`, an invalid model is an error. Otherwise `lenient` reads the file and
    tolerates invalid models."""
    loaded = PartialConfig(read_config(file)) if check else read_leniently(file, lenient)
    config = loaded.config
    if config.gateway.processes != 1:
        fail(f"{file}: gateway.processes: a container holds one process: set 1 and raise the replicas", USAGE)
    return loaded


def _refuse_lacks(lacks: Iterator[str], file: Path, check: bool) -> None:
    """Exit with code 2 and print the messages in `lacks`, if there are any. Each names a setting or file that is
    missing. If there are none and `check` is set, exit with code 0."""
    messages = [f"{file}: {lack}" for lack in lacks]
    if messages:
        fail("\n".join(messages), USAGE)
    if check:
        terminal.say(f"{file}: valid, and every file that it names is here")
        raise typer.Exit(0)


def gateway_problems(config: Config, *, pod: bool = True, files: bool = True) -> Iterator[str]:
    """Yield a message for each setting or file that a gateway with this configuration lacks.

    With `pod`, the settings that a pod needs are checked. With `files`, the files that the configuration names are
    checked.
    """
    if pod:
        yield from _missing_pod_settings(config)
    if files:
        yield from _unreadable_tls_files("gateway.tls", config.gateway.tls)
        yield from _unreadable_tls_files("gateway.link_tls", config.gateway.link_tls)
        for setting, path in secret_files(config).items():
            yield from unreadable_file(setting, path)
        if config.observe.budget_webhook is not None:
            path = config.observe.budget_webhook.secret_file
            yield from unreadable_file("observe.budget_webhook.secret_file", path)
        if (tracing := config.observe.tracing) is not None:
            for name, file in (("ca_file", tracing.ca_file), ("headers_file", tracing.headers_file)):
                if file is not None:
                    yield from unreadable_file(f"observe.tracing.{name}", file)


def _missing_pod_settings(config: Config) -> Iterator[str]:
    for name, address in config.gateway.listen.model_dump().items():
        if is_loopback(address):
            yield f"gateway.listen.{name}: {address} is not reachable from outside this pod: listen on 0.0.0.0"
        elif address.endswith(":0"):
            yield f"gateway.listen.{name}: {address}: a pod's ports are declared before it starts: set a fixed port"
    if not config.store.database_url and config.auth is not None:
        yield "store.database_url: not set: gateways cannot share a pod's own SQLite: set a PostgreSQL URL"


def controller_problems(config: Config, *, pod: bool = True, files: bool = True) -> Iterator[str]:
    """Yield a message for each setting or file that a controller with this configuration lacks.

    `pod`: check the settings that a controller in a pod needs. `files`: check the files that the configuration names.
    """
    if pod and not config.ray:
        yield "ray: empty: a controller in a pod starts no Ray: set the dashboard_url of the Ray cluster"
    if pod and not config.link.gateways:
        yield "link.gateways: empty: set the link addresses of the gateways"
    if pod and config.link.tls is None:
        yield "link.tls: not set: the gateways' link port requires a client certificate"
    if files:
        yield from _unreadable_tls_files("link.tls", config.link.tls)
        for cluster in config.ray:
            if cluster.token_file is not None:
                yield from unreadable_file(f"ray[{cluster.name}].token_file", cluster.token_file)


def _unreadable_tls_files(setting: str, tls: Tls | ClientTls | None) -> Iterator[str]:
    for name, path in tls.model_dump().items() if tls is not None else ():
        if path is not None:
            yield from unreadable_file(f"{setting}.{name}", path, may_be_empty=name == "revoked_serials_file")


def unreadable_file(setting: str, path: Path, *, may_be_empty: bool = False) -> Iterator[str]:
    """Yield a message if the file of a setting cannot be read. Without `may_be_empty`, also yield one if the file is
    empty."""
    try:
        if not path.read_bytes().strip() and not may_be_empty:
            yield f"{setting}: {path} is empty"
    except OSError as error:
        yield f"{setting}: {path} cannot be read: {error.strerror}"
