"""The controller process: construction of the parts, and their run until a stop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.api.types import ModelSpec
from cluster.config.lenient import PartialConfig
from cluster.config.schema import Config
from cluster.controller import catalog_service, scaling
from cluster.controller.bundling import BundleBuilder
from cluster.controller.catalog_verbs import catalog_verbs
from cluster.controller.controller import Controller
from cluster.controller.last_good import held_names, with_last_good
from cluster.controller.links import ControllerLinks
from cluster.controller.replica_settings import link_tls, settings_of
from cluster.controller.scaling_verbs import scaling_verbs
from cluster.observe.metrics import Metrics
from cluster.policy.scaling.operator_requests import ScalingRequests
from cluster.policy.scaling.scaler import Scaler
from cluster.process.private_files import make_private_folder
from cluster.ray.backend import Backend, ChildBackend, RayAway
from cluster.ray.jobs import JobBackend
from cluster.ray.several_clusters import MultiClusterBackend

END_SERVE_S = 6.0


def _backend(config: Config, instance: str, ray_address: str | None, run_folder: Path) -> Backend:
    if ray_address is not None:
        make_private_folder(run_folder)
        tag = {"HEADRACE_INSTANCE": instance}
        return ChildBackend(config.name, ray_address, tag, run_folder / "driver.log")
    if not config.ray:
        raise ValueError("ray: is empty; name a Ray cluster to run models on, with its dashboard_url")
    return MultiClusterBackend(
        {ray.name: JobBackend(config.name, ray.dashboard_url, ray.token_file) for ray in config.ray}
    )


async def run_controller(
    config: Config,
    *,
    instance: str,
    ray_address: str | None,
    gateways: Sequence[str],
    run_folder: Path,
    stop: asyncio.Event,
    end_serve: bool = False,
    metrics: Metrics | None = None,
    found: PartialConfig | None = None,
) -> None:
    """Run a controller until `stop` is set.

    `ray_address`: address of a local Ray, whose token is in this process's environment; None: use the Ray clusters in
    `config.ray`. `gateways`: link addresses that the controller and the workers dial. `end_serve`: when the controller
    ends, shut down Serve and thereby end every replica; for a local Ray only. Without `end_serve`, replicas keep
    running after the controller has ended. `found`: the result of reading the configuration file, with the problems in
    the file.
    """
    found = with_last_good(found or PartialConfig(config), run_folder)
    config = found.config
    local = ray_address is not None
    backend = _backend(config, instance, ray_address, run_folder)
    builder = BundleBuilder(run_folder / "bundles", local=local)
    links = ControllerLinks(
        controller_id=f"{config.name}-{instance}",
        gateways=gateways,
        tls=link_tls(config, local=local),
        bundles=builder.bundle,
    )
    requests_file = scaling.OperatorRequestFile(run_folder / "scaling.json")
    scaler = Scaler(scaling.settings_of(config), time.monotonic(), requests_file.read())
    controller = Controller(
        backend, links, known=builder.known, scaler=scaler, drain_timeout_s=config.gateway.drain_timeout_s
    )
    controller.hold(
        [ModelSpec(model.name, "", model.aliases, fallback=model.fallback) for model in found.held], found.all_held
    )
    if metrics is not None:
        counters = scaling.Counters(metrics)
        controller.on_scaling_pass = lambda: counters.count(scaler)
    scaling.connect_demand(links, scaler, controller.now, controller.wake)

    def on_scaling_request() -> None:
        requests_file.keep(scaler.operator_requests)
        controller.wake()

    links.verbs |= scaling_verbs(ScalingRequests(scaler, on_scaling_request))
    catalog = catalog_service.StoredCatalogService(
        config,
        controller,
        catalog_service.StoredCatalogFile(run_folder / "catalog.json", instance if local else ""),
        lambda config: settings_of(config, gateways=gateways, local=local),
        by_file=not local,
        held=held_names(found.held),
        on_want=builder.want,
    )
    controller.on_mark = catalog.keep
    links.verbs |= catalog_verbs(catalog)
    tasks = [
        asyncio.create_task(links.run()),
        asyncio.create_task(controller.run()),
        asyncio.create_task(builder.run()),
    ]
    stopped = asyncio.create_task(stop.wait())
    try:
        await _wait_for_stop(stopped, tasks)
    finally:
        for task in (stopped, *tasks):
            task.cancel()
        await asyncio.gather(stopped, *tasks, return_exceptions=True)
        if end_serve:
            with contextlib.suppress(RayAway, TimeoutError):
                async with asyncio.timeout(END_SERVE_S):
                    await backend.shutdown()
        await backend.close()


async def _wait_for_stop(stopped: asyncio.Task[bool], tasks: Sequence[asyncio.Task[None]]) -> None:
    """Wait until `stopped` is done. If a task in `tasks` fails first, raise the error of that task. A task may end
    without an error."""
    pending: set[asyncio.Task[None] | asyncio.Task[bool]] = {stopped, *tasks}
    while not stopped.done():
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
