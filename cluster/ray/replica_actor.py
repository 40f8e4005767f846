"""Adapter between Replica and Ray Serve: the class of the actors that Serve creates, and the deployment of that
class.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import ray
from ray import serve

from cluster.observe import log
from cluster.observe.line_writer import STDOUT
from cluster.observe.output_copy import PATH_VARIABLE, copy_output
from cluster.policy.catalog.placement import is_simulated, placement, world_size
from cluster.process.place import node_name, pod_name
from cluster.ray import node_drain
from cluster.ray.drain_time import usable_s
from cluster.worker import settings as replica_settings
from cluster.worker.engine.processes import end_causes
from cluster.worker.open_model import open_model
from cluster.worker.replica import Replica, ReplicaPlacement
from cluster.worker.settings import ReplicaSettings
from cluster.worker.weights.fetch_progress import FetchProgress

DEPLOYMENT = "worker"
_SERVE_LOGGER = "ray.serve"
_LOGICAL_GPUS = "HEADRACE_LOGICAL_GPUS"
HEALTH_CHECK_PERIOD_S = 2.0
HEALTH_CHECK_TIMEOUT_S = 10.0
START_TRIES = 2
"""Number of starts that Serve tries before giving up.

The second start helps if the first failed for a cause outside the model's entry, such as a lost node.
"""
_SHUTDOWN_MARGIN_S = 3.0


class ServedReplica:
    """Class of the actors that Serve creates, one for each replica.

    Serve calls, in this order: __init__, reconfigure, check_health repeatedly, __del__.
    """

    def __init__(self, settings: Mapping[str, object]) -> None:
        parsed = replica_settings.from_json(settings)
        log.keep_handlers_open(logging.getLogger(_SERVE_LOGGER))
        if not is_simulated(parsed.spec):
            from cluster.worker.engine.processes import fork_server
            from cluster.worker.engine.vllm import repairs

            fork_server.start()  # first, so that the fork server and this process import at the same time
            os.environ[repairs.NODE] = str(ray.util.get_node_ip_address())
        fetching = FetchProgress()
        opener = partial(open_model, progress=fetching.report)
        self._replica = Replica(parsed, _place(), opener, fetching=fetching)
        place = self._replica.place
        _configure_log(self._replica)
        self._nodes = node_drain.Nodes({place.node, *place.gpu_nodes}, ray.get_runtime_context().gcs_address)
        self._watch: asyncio.Task[None] | None = None

    async def reconfigure(self, _digest: object) -> None:
        """Start the replica at the first call. Later calls do nothing.

        If the model's catalog entry changes, Serve creates new replicas in a new deployment version.
        """
        if self._replica.engine is None:
            await self._replica.start()
            self._watch = asyncio.create_task(node_drain.watch(self._nodes, self._replica.leave))

    async def check_health(self) -> None:
        """Raise an error if this replica no longer serves. Serve then replaces the replica."""
        await self._replica.check()

    async def __del__(self) -> None:
        """Drain and close the replica. Serve awaits this method in a graceful shutdown.

        On a draining node, Serve may call this method before the replica's own poll has noticed the drain. The node may
        then end before the drain timeout of the settings, so this method queries the remaining time.
        """
        left_s = await node_drain.poll_left_s(self._nodes, within_s=node_drain.LAST_POLL_S)
        await self._replica.stop(math.inf if left_s is None else usable_s(left_s))
        if self._watch is not None:
            self._watch.cancel()


def _configure_log(replica: Replica) -> None:
    """Write the log as JSON to the standard output, with the worker's id, pod and node in every line. Also copy the
    standard output and the standard error to the file that the environment variable PATH_VARIABLE names, if it is set.
    The file may be the container's own output."""
    settings, place = replica.settings, replica.place
    gpu = {"gpu": settings.spec.gpu or "unknown"} if place.gpus else {}
    if gpu and (visible := os.environ.get("CUDA_VISIBLE_DEVICES")):
        gpu["gpu_ids"] = visible
    fields = {
        "cluster": settings.cluster,
        "part": "worker",
        "worker": replica.worker_id,
        "pod": place.pod,
        "node": place.host or place.node,
        **gpu,
    }
    log.configure(os.environ.get("HEADRACE_LOG_LEVEL", "info"), fields, descriptor=STDOUT)
    copy_output(os.environ.get(PATH_VARIABLE, ""), fields, end_causes.file_of)


def _place() -> ReplicaPlacement:
    context = ray.get_runtime_context()
    group = ray.util.get_current_placement_group()
    gpu_nodes: list[str] = []
    if group is not None:
        node_of = ray.util.placement_group_table(group)["bundles_to_node_id"]
        gpu_nodes = [node_of[i] for i, bundle in enumerate(group.bundle_specs) if bundle.get("GPU")]
    gpus = 0 if os.environ.get(_LOGICAL_GPUS) == "1" else len(gpu_nodes)
    return ReplicaPlacement(
        serve.get_replica_context().replica_id.unique_id,
        context.get_node_id(),
        tuple(gpu_nodes),
        gpus,
        pod_name(),
        node_name(),
    )


def application(settings: ReplicaSettings, *, logical_gpus: bool, served: type = ServedReplica) -> Any:
    """Build the Serve application of one model. `logical_gpus`: whether Ray has only logical GPUs, so that vLLM runs on
    CPUs."""
    group = placement(settings.spec)
    replicas = settings.spec.replicas if settings.replicas is None else settings.replicas
    deployment = serve.deployment(
        served,
        name=DEPLOYMENT,
        num_replicas=max(replicas, 1),
        user_config={"digest": settings.digest, "gpu": settings.spec.gpu},
        placement_group_bundles=list(group.bundles),
        placement_group_strategy=group.strategy,
        max_ongoing_requests=1_000,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=settings.drain_timeout_s + _SHUTDOWN_MARGIN_S,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        max_constructor_retry_count=START_TRIES,
        ray_actor_options={
            "num_cpus": group.replica_cpus,
            "num_gpus": group.replica_gpus,
            "runtime_env": {"env_vars": environment(settings, logical_gpus=logical_gpus)},
        },
    )
    deployment._deployment_config.num_replicas = replicas  # may be 0, which only the decorator refuses
    return deployment.bind(settings.to_json())


def environment(settings: ReplicaSettings, *, logical_gpus: bool) -> dict[str, str]:
    """Return the environment variables for a replica and the child processes of the replica."""
    values = {"VLLM_NO_USAGE_STATS": "1"}
    if not is_simulated(settings.spec):
        # The engine core joins this Ray. Without an address, the engine core would start another Ray.
        values["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        if world_size(settings.spec) > 1:
            values["VLLM_USE_RAY_V2_EXECUTOR_BACKEND"] = "1"
        if logical_gpus:
            values |= {_LOGICAL_GPUS: "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return {**passed_on, **values, **settings.environment}


PASSED_ON = (
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "HEADRACE_INSTANCE",
    "HEADRACE_CACHE_DIR",
    "HEADRACE_LOG_LEVEL",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_COMPUTE_NANS_IN_LOGITS",
    "RAY_AUTH_MODE",
)
"""Environment variables that replicas inherit from the deploying process. No secret may be listed, since Ray's
dashboard shows the variables. No name of a network interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) may be listed: a
replica gets this name from the environment of its own node, and the names may differ between worker groups."""
