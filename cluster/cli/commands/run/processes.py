"""Hidden commands that run the processes of a local cluster. The command `up` calls them.

Each process reads one configuration file. SIGTERM, SIGINT or SIGHUP ends the process.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.base import USAGE, FileOption, fail, read_config, read_leniently, replace_file
from cluster.config.lenient import load_for_controller, load_for_gateway
from cluster.config.paths import cache_dir
from cluster.config.schema import Config
from cluster.observe import log
from cluster.process import memory
from cluster.process.core_dumps import disable_core_dumps
from cluster.process.descriptors import raise_descriptor_limit
from cluster.process.private_files import make_private_folder

if TYPE_CHECKING:
    from cluster.observe.metrics import Metrics
    from cluster.worker.weights.sources import SourceRules

FolderOption = Annotated[Path, typer.Option("--folder", help="Folder for files that must outlive the process.")]
ReadyOption = Annotated[
    Path | None, typer.Option("--ready-file", help="File to write pid and endpoints to, as JSON, once it serves.")
]
DrainOption = Annotated[float | None, typer.Option("--drain-s", help="Overrides gateway.drain_timeout_s.", min=0)]


def gateway(
    file: FileOption,
    folder: FolderOption,
    ready_file: ReadyOption = None,
    drain_s: DrainOption = None,
    process: Annotated[
        int, typer.Option("--process", help="Index of this process among gateway.processes, from 0.", min=0)
    ] = 0,
) -> None:
    """Run one gateway process in the foreground."""
    loaded = read_leniently(file, load_for_gateway)
    config = loaded.config
    if process >= config.gateway.processes:
        fail(f"--process {process}: gateway.processes is {config.gateway.processes}, and they count from 0", USAGE)
    if drain_s is not None:
        config = config.model_copy(update={"gateway": config.gateway.model_copy(update={"drain_timeout_s": drain_s})})
    log.configure(config.observe.log_level, {"cluster": config.name, "part": part_name(process)})
    disable_core_dumps()
    link = bound_link(config, process)
    from cluster.gateway.config_state import ConfigState
    from cluster.gateway.server import run_gateway

    def ready(endpoints: dict[str, str]) -> None:
        memory.freeze_objects()
        if ready_file is not None:
            replace_file(ready_file, json.dumps({"pid": os.getpid(), "endpoints": endpoints}))

    async def serve() -> None:
        await run_gateway(
            config,
            folder=folder,
            stop=stop_on_signal(),
            ready=ready,
            process=process,
            link=link,
            config_state=ConfigState(file, loaded.problems),
        )

    run(serve())


def bound_link(config: Config, process: int = 0) -> socket.socket:
    """Bind the link port of a gateway process. If the port is in use, the command ends with an error.

    Call this function before the gateway's modules are imported.
    """
    from cluster.gateway.links.listener import bind_link

    try:
        return bind_link(config, process)
    except RuntimeError as error:
        fail(str(error))


def part_name(process: int) -> str:
    """Return the name of a gateway process in logs, run folders and messages."""
    return f"gateway-{process}" if process else "gateway"


def controller(
    file: FileOption,
    folder: FolderOption,
    instance: Annotated[str, typer.Option("--instance", help="The instance id of this cluster's processes.")] = "",
    ray_address: Annotated[
        str | None, typer.Option("--ray-address", help="The Ray that this cluster owns; without it, the file's `ray`.")
    ] = None,
    gateways: Annotated[
        list[str] | None, typer.Option("--gateway", help="A link address to dial instead of link.gateways; repeatable.")
    ] = None,
    metrics: Annotated[str, typer.Option("--metrics", help="Serve metrics at HOST:PORT (by custom port 9401).")] = "",
) -> None:
    """Run the controller in the foreground. With --ray-address, the controller shuts down Ray Serve when it ends."""
    from cluster.controller.controller_metrics import controller_metrics
    from cluster.controller.process import run_controller

    loaded = read_leniently(file, load_for_controller)
    config = loaded.config
    dial = tuple(gateways or config.link.gateways)
    if not dial:
        fail("link.gateways: empty: set it, or give --gateway HOST:PORT", USAGE)
    log.configure(config.observe.log_level, {"cluster": config.name, "part": "controller"})
    os.environ.setdefault("HEADRACE_LOG_LEVEL", config.observe.log_level)  # for replicas
    raise_descriptor_limit()
    exported, gauges = controller_metrics(config)
    gauges.leads = True
    check_metrics_address(metrics)

    async def serve() -> None:
        async with metrics_page(exported, metrics):
            await run_controller(
                config,
                instance=instance or f"{os.getpid()}",
                ray_address=ray_address,
                gateways=dial,
                run_folder=folder,
                stop=stop_on_signal(),
                end_serve=ray_address is not None,
                metrics=exported,
                found=loaded,
            )

    make_private_folder(folder)
    run(serve())


def check_metrics_address(address: str) -> None:
    """End the command with an error if the address of a metrics page is neither "" nor HOST:PORT."""
    host, _, port = address.rpartition(":")
    if address and not (host and port.isdecimal()):
        fail(f"--metrics {address!r}: expected HOST:PORT", USAGE)


@asynccontextmanager
async def metrics_page(metrics: Metrics, address: str) -> AsyncIterator[None]:
    """Serve the metrics of a process at `address` (HOST:PORT). Does nothing if `address` is empty."""
    if not address:
        yield
        return
    from cluster.gateway.metrics_page import metrics_served

    host, _, port = address.rpartition(":")
    async with metrics_served(metrics, host.strip("[]"), int(port)):
        yield


def prepare(file: FileOption) -> None:
    """Check every model's source; fetch or build missing weights. Prints progress as JSON lines on standard output."""
    from cluster.worker.weights.sources import SourceError, resolve

    config = read_config(file)
    rules = source_rules(config)
    for model in config.models:
        if model.source.startswith("sim://"):
            continue

        def report(done: int, total: int, what: str, name: str = model.name) -> None:
            _write_json_line({"model": name, "done": done, "total": total, "what": what})

        try:
            resolve(model.spec(), rules, report)
        except SourceError as error:
            fail(str(error))
        _write_json_line({"model": model.name, "ready": True})


def source_rules(config: Config) -> SourceRules:
    """Return the rules for weight sources: cache folder, hub access, and the allowed sources, formats and licenses."""
    from cluster.worker.weights.sources import SourceRules

    weights = config.weights
    return SourceRules(
        cache_dir=weights.cache_dir or cache_dir(),
        hub_endpoint=weights.hugging_face.endpoint,
        hub_token_file=weights.hugging_face.token_file,
        allowed_sources=weights.allow.sources,
        allowed_formats=weights.allow.formats,
        allow_remote_code=weights.allow.remote_code,
        allowed_licenses=weights.allow.licenses,
    )


def _write_json_line(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def stop_on_signal() -> asyncio.Event:
    """Return an event that SIGTERM, SIGINT or SIGHUP sets."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    return stop


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run the main coroutine of a process. An error with a port or a file is printed as one line."""
    try:
        asyncio.run(main)
    except (RuntimeError, OSError, ValueError) as error:
        fail(str(error))
