"""The only calls to Ray Serve that create, scale, delete and observe applications.

All calls block, and therefore run in a driver process (driver.py). Applications are deployed one at a time, with
serve.run_many. A deployment does not wait until the application runs. Applications of other owners and the settings of
an existing Serve are not changed.
"""

from __future__ import annotations

import json
from typing import Any

import ray
from ray import serve
from ray.serve._private.common import DeploymentID
from ray.serve.api import RunTarget
from ray.serve.context import _get_global_client

from cluster.ray.replica_actor import DEPLOYMENT, ServedReplica, application
from cluster.ray.serve_status import application_name
from cluster.worker.settings import ReplicaSettings


class ServeApps:
    """The Serve applications of one Headrace cluster, on the Ray cluster that this process has joined."""

    def __init__(self, cluster: str, served: type = ServedReplica) -> None:
        self._cluster = cluster
        self._served = served

    def connect(self, address: str) -> None:
        """Join the Ray cluster at `address` ("auto" inside a Ray job). Raises ConnectionError."""
        ray.init(address=address, log_to_driver=False, logging_level="WARNING", namespace="headrace")

    def observe(self) -> dict[str, Any]:
        """Return `details` (Serve's REST answer) and `nodes` (total resources of each living node) as JSON values."""
        client = _get_global_client(raise_if_no_controller_running=False)
        details = client.get_serve_details() if client is not None else {}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        plain: dict[str, Any] = json.loads(json.dumps({"details": details, "nodes": nodes}, default=str))
        return plain

    def deploy(self, settings: ReplicaSettings) -> None:
        """Deploy an application. If the application exists already, all replicas of the application are replaced."""
        serve.start(proxy_location="Disabled")
        target = RunTarget(
            target=application(settings, logical_gpus=not _has_accelerators(), served=self._served),
            name=application_name(self._cluster, settings.app),
            route_prefix=None,
            external_scaler_enabled=True,
        )
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)

    def scale(self, app: str, replicas: int) -> None:
        """Set the number of replicas of an application. Serve's REST endpoint is not used, because it needs Ray's
        dashboard."""
        deployment = DeploymentID(name=DEPLOYMENT, app_name=application_name(self._cluster, app))
        ray.get(_get_global_client()._controller.update_deployment_replicas.remote(deployment, replicas))

    def delete(self, app: str) -> None:
        """Begin to drain and remove an application. Does not wait until the application is removed."""
        serve.delete(application_name(self._cluster, app), _blocking=False)

    def shutdown(self) -> None:
        """Shut down Serve after its replicas have drained. Use this only on a local Ray, because the applications of
        other owners end too."""
        serve.shutdown()


def _has_accelerators() -> bool:
    """Return whether a node has real GPUs.

    For real GPUs, Ray adds a resource with the accelerator type to the node; for logical GPUs it does not.
    """
    return any(name.startswith("accelerator_type:") for name in ray.cluster_resources())
