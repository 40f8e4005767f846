"""All calls to Ray Serve, in one class: applications are made, scaled, deleted and looked at here and nowhere else.

Blocking; lives in a driver process (driver.py). Applications are made by serve.run's own function, one at a time and
without waiting for them to run. Foreign applications and a foreign Serve's settings stay as they are.
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
    """One cluster's applications on the Ray that this process is connected to."""

    def __init__(self, cluster: str, served: type = ServedReplica) -> None:
        self._cluster = cluster
        self._served = served

    def connect(self, address: str) -> None:
        """Join the Ray at `address` ("auto" inside a Ray job). Raises ConnectionError."""
        ray.init(address=address, log_to_driver=False, logging_level="WARNING", namespace="headrace")

    def observe(self) -> dict[str, Any]:
        """`details` as Serve's REST answer, `nodes` as each living node's total resources; plain JSON values."""
        client = _get_global_client(raise_if_no_controller_running=False)
        details = client.get_serve_details() if client is not None else {}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        plain: dict[str, Any] = json.loads(json.dumps({"details": details, "nodes": nodes}, default=str))
        return plain

    def deploy(self, settings: ReplicaSettings) -> None:
        """Make an application, or make it anew: every replica of it restarts."""
        serve.start(proxy_location="Disabled")
        target = RunTarget(
            target=application(settings, logical_gpus=not _has_accelerators(), served=self._served),
            name=application_name(self._cluster, settings.app),
            route_prefix=None,
            external_scaler_enabled=True,
        )
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)

    def scale(self, app: str, replicas: int) -> None:
        """Serve's external scaling call: what its REST endpoint does, without needing the dashboard."""
        where = DeploymentID(name=DEPLOYMENT, app_name=application_name(self._cluster, app))
        ray.get(_get_global_client()._controller.update_deployment_replicas.remote(where, replicas))

    def delete(self, app: str) -> None:
        """Drain and remove an application; returns at once."""
        serve.delete(application_name(self._cluster, app), _blocking=False)

    def shutdown(self) -> None:
        """End Serve as a whole: for a Ray of our own only. Replicas drain first."""
        serve.shutdown()


def _has_accelerators() -> bool:
    """Whether some node has real GPUs: Ray marks those with their type, and logical ones with nothing."""
    return any(name.startswith("accelerator_type:") for name in ray.cluster_resources())
