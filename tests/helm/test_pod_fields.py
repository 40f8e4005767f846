"""Fields that platform teams need on the pods of GPU workers: each can be set for one group."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from tests.support import helm
from tests.support.helm import Rendered

pytestmark = pytest.mark.slow

SPREAD = {
    "maxSkew": 1,
    "topologyKey": "rack",
    "whenUnsatisfiable": "DoNotSchedule",
    "labelSelector": {"matchLabels": {"app.kubernetes.io/name": "headrace"}},
}
INIT = {"name": "wait", "image": "busybox:1.37", "command": ["sh", "-c", "true"]}
AFFINITY: dict[str, Any] = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}
TEMPLATE = {
    "metadata": {"annotations": {"k8s.v1.cni.cncf.io/networks": "rdma"}, "labels": {"kueue.x-k8s.io/queue-name": "a"}},
    "spec": {
        "runtimeClassName": "nvidia",
        "affinity": AFFINITY,
        "topologySpreadConstraints": [SPREAD],
        "priorityClassName": "gold",
        "schedulerName": "volcano",
        "hostNetwork": True,
        "terminationGracePeriodSeconds": 900,
        "initContainers": [INIT],
        "volumes": [{"name": "ca", "configMap": {"name": "ca"}}],
        "containers": [
            {
                "name": "ray-worker",
                "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
                "volumeMounts": [{"name": "ca", "mountPath": "/ca"}],
            }
        ],
    },
}
GROUP = {
    "name": "gpu",
    "gpusPerNode": 8,
    "minReplicas": 2,
    "maxReplicas": 4,
    "numOfHosts": 2,
    "podDisruptionBudget": {"minAvailable": 3},
    "podTemplate": TEMPLATE,
}
RELEASE: dict[str, Any] = {
    "ray": {"clusters": [{"name": "blue", "workerGroups": [GROUP]}]},
    "networkPolicy": {"nodes": ["10.0.0.0/24"]},
}


@functools.cache
def release() -> Rendered:
    """The release with every field set."""
    return helm.template(RELEASE)


def group() -> dict[str, Any]:
    """Return the rendered worker group."""
    return dict(release().only("RayCluster")["spec"]["workerGroupSpecs"][0])


def spec() -> dict[str, Any]:
    """Return the spec of the group's pods."""
    return dict(group()["template"]["spec"])


def container() -> dict[str, Any]:
    """Return the worker's container."""
    return dict(spec()["containers"][0])


def budgets() -> list[dict[str, Any]]:
    """Return the specs of all disruption budgets."""
    return [item["spec"] for item in release().all("PodDisruptionBudget")]


FIELDS: dict[str, Callable[[], bool]] = {
    "runtimeClassName": lambda: spec()["runtimeClassName"] == "nvidia",
    "annotations": lambda: group()["template"]["metadata"]["annotations"]["k8s.v1.cni.cncf.io/networks"] == "rdma",
    "labels": lambda: group()["template"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "a",
    "affinity": lambda: spec()["affinity"] == AFFINITY,
    "topologySpreadConstraints": lambda: SPREAD in spec()["topologySpreadConstraints"],
    "priorityClassName": lambda: spec()["priorityClassName"] == "gold",
    "schedulerName": lambda: spec()["schedulerName"] == "volcano",
    "securityContext": lambda: container()["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"],
    "hostNetwork": lambda: spec()["hostNetwork"] is True,
    "initContainers": lambda: INIT in spec()["initContainers"],
    "volumes": lambda: TEMPLATE["spec"]["volumes"][0] in spec()["volumes"],  # type: ignore[index]
    "volumeMounts": lambda: any(mount["mountPath"] == "/ca" for mount in container()["volumeMounts"]),
    "terminationGracePeriodSeconds": lambda: spec()["terminationGracePeriodSeconds"] == 900,
    "numOfHosts": lambda: group()["numOfHosts"] == 2,
    "podDisruptionBudget": lambda: any(budget.get("minAvailable") == 3 for budget in budgets()),
}


@pytest.mark.parametrize("field", FIELDS)
def test_the_field_can_be_set(field: str) -> None:
    """Each field of the worker group is rendered as written in the values."""
    assert FIELDS[field]()
