"""The controller process: constructs the controller's parts, and runs the parts until the process is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cluster.api.types import ModelSpec
from cluster.config.lenient import PartialConfig
from cluster.config.schema import Config
from cluster.controller import scaling
from cluster.controller.bundling import BundleBuilder
from cluster.controller.catalog_overlay import CatalogOverlayFile
from cluster.controller.catalog_service import StoredCatalogService
from cluster.controller.catalog_verbs import catalog_verbs
from cluster.controller.controller import Controller
from cluster.controller.desired_models import DesiredModels
from cluster.controller.editable_catalog import EditableCatalog
from cluster.controller.gauges import ray_samples
from cluster.controller.last_good import held_names, with_last_good
from cluster.controller.links import ControllerLinks
from cluster.controller.operator_state import CATALOG_FILE, SCALING_FILE, OperatorState, recover
from cluster.controller.published_catalog import PublishedCatalog
from cluster.controller.replica_settings import link_tls, settings_of
from cluster.controller.retired_apps import RetiredApps
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
    if ray_address is None:  # the folder of a local cluster outlives its controller
        await recover(gateways, link_tls(found.config, local=False), run_folder)
    backend = _backend(found.config, instance, ray_address, run_folder)
    parts = _parts(found, backend, instance, gateways, run_folder, metrics, local=ray_address is not None)
    gauges = partial(ray_samples, backend, parts[1])
    if metrics is not None:
        metrics.add_gauges(gauges)
    tasks = [asyncio.create_task(part.run()) for part in parts]
    stopped = asyncio.create_task(stop.wait())
    try:
        await _wait_for_stop(stopped, tasks)
    finally:
        for task in (stopped, *tasks):
            task.cancel()
        await asyncio.gather(stopped, *tasks, return_exceptions=True)
        if metrics is not None:
            metrics.remove_gauges(gauges)
        if end_serve:
            with contextlib.suppress(RayAway, TimeoutError):
                async with asyncio.timeout(END_SERVE_S):
                    await backend.shutdown()
        await backend.close()


def _parts(
    found: PartialConfig,
    backend: Backend,
    instance: str,
    gateways: Sequence[str],
    run_folder: Path,
    metrics: Metrics | None,
    *,
    local: bool,
) -> tuple[ControllerLinks, Controller, BundleBuilder]:
    """Construct the parts of a controller that have a `run` method. `local`: the replicas run on this host."""
    state = OperatorState(run_folder)
    config, builder = found.config, BundleBuilder(run_folder / "bundles", local=local)
    models, published = DesiredModels(), PublishedCatalog(builder.known)
    models.hold(
        [ModelSpec(model.name, "", model.aliases, fallback=model.fallback) for model in found.held], found.all_held
    )
    links: ControllerLinks | None = None

    def on_stored() -> None:
        message = state.record_change()
        if links is not None:  # else the catalog is being restored, and the new links get the message
            links.set_operator_state(message)

    catalog = EditableCatalog(
        config,
        models,
        CatalogOverlayFile(run_folder / CATALOG_FILE, instance if local else "", on_stored),
        lambda config: settings_of(config, gateways=gateways, local=local),
        by_file=not local,
        held=held_names(found.held),
        is_whole=not found.problems,
        on_want=builder.want,
    )
    requests_file = scaling.OperatorRequestFile(run_folder / SCALING_FILE)
    scaler = Scaler(scaling.settings_of(config), time.monotonic(), requests_file.read())

    def on_scaling_request() -> None:
        requests_file.keep(scaler.operator_requests)
        on_stored()
        models.changed.set()

    links = ControllerLinks(
        controller_id=f"{config.name}-{instance}",
        gateways=gateways,
        tls=link_tls(config, local=local),
        bundles=builder.bundle,
        listener=scaling.DemandRecorder(scaler, models.changed.set),
        verbs={
            **scaling_verbs(ScalingRequests(scaler, on_scaling_request)),
            **catalog_verbs(StoredCatalogService(catalog, models, published)),
        },
    )
    links.set_operator_state(state.message)
    retired = RetiredApps(config.gateway.drain_timeout_s)
    counters = scaling.Counters(metrics) if metrics is not None else None
    return links, Controller(backend, links, models, published, retired, scaler, counters, catalog.store), builder


async def _wait_for_stop(stopped: asyncio.Task[bool], tasks: Sequence[asyncio.Task[None]]) -> None:
    """Wait until `stopped` is done. If a task in `tasks` fails earlier, raises the error of that task. A task that ends
    without an error does not end the wait."""
    pending: set[asyncio.Task[None] | asyncio.Task[bool]] = {stopped, *tasks}
    while not stopped.done():
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
