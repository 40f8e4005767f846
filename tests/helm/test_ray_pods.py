"""Ray's pods: shared memory, the node's disk, the drain time and the preStop hooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from ray._private.ray_constants import OBJECT_STORE_MINIMUM_MEMORY_BYTES
from ray._private.utils import resolve_object_store_memory

from cluster.config.document import parse
from cluster.ray.drain_time import TIMEOUT_ENV, ray_timeout_s, usable_s
from tests.helm.test_policies import containers, pods, size
from tests.support import helm
from tests.support.helm import Rendered
from tests.support.network_policies import selects

SPARE_NO_NODE = {"prod-405b"}
"""Clusters whose preset lets no worker be evicted, since an engine runs on all of them."""


def ray_groups(rendered: Rendered) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, group) of the head and of each worker group."""
    for cluster in rendered.all("RayCluster"):
        yield "head", cluster["spec"]["headGroupSpec"]
        for group in cluster["spec"]["workerGroupSpecs"]:
            yield group["groupName"], group


def shared_memory(spec: dict[str, Any]) -> float:
    """Return the number of bytes of a pod's /dev/shm."""
    (mount,) = (item for item in spec["containers"][0]["volumeMounts"] if item["mountPath"] == "/dev/shm")
    (volume,) = (item for item in spec["volumes"] if item["name"] == mount["name"])
    assert volume["emptyDir"]["medium"] == "Memory"
    return size(volume["emptyDir"]["sizeLimit"])


def test_the_object_store_lies_in_shared_memory(preset: Rendered) -> None:
    """By Ray's own calculation, the object store fits into half of /dev/shm. The other half is left for engines."""
    for name, group in ray_groups(preset):
        spec = group["template"]["spec"]
        memory = int(size(spec["containers"][0]["resources"]["limits"]["memory"]))
        asked = group["rayStartParams"].get("object-store-memory")
        store = resolve_object_store_memory(memory, None if asked is None else int(asked))
        assert OBJECT_STORE_MINIMUM_MEMORY_BYTES <= store <= min(shared_memory(spec) / 2, 1e9), name


@pytest.mark.parametrize("shm", ["256Mi", "3Gi"])
def test_the_object_store_follows_shared_memory(shm: str) -> None:
    """Any size of shared memory that the schema allows gives an object store that Ray accepts."""
    group = {"name": "g", "minReplicas": 0, "maxReplicas": 1, "shmSize": shm}
    rendered = helm.template({"ray": {"clusters": [{"name": "blue", "workerGroups": [group]}]}})
    (store,) = (
        int(item["rayStartParams"]["object-store-memory"]) for name, item in ray_groups(rendered) if name == "g"
    )
    assert store == min(int(size(shm)) // 2, 10**9)


@pytest.mark.parametrize("shm", ["255Mi"])
def test_too_little_shared_memory_is_refused(shm: str) -> None:
    """Shared memory is refused if half of it is less than Ray's minimum for the object store."""
    group = {"name": "g", "minReplicas": 0, "maxReplicas": 1, "shmSize": shm}
    with pytest.raises(helm.HelmFailed, match="shmSize"):
        helm.template({"ray": {"clusters": [{"name": "blue", "workerGroups": [group]}]}})


def test_what_is_written_to_the_nodes_disk_is_requested(preset: Rendered) -> None:
    """A pod's disk request covers its emptyDir volumes, so that the scheduler does not overfill a node's disk.

    On a full disk the kubelet would evict pods.
    """
    for name, _, spec in pods(preset):
        on_disk = [item["emptyDir"] for item in spec.get("volumes", ()) if "emptyDir" in item]
        sizes = [size(item["sizeLimit"]) for item in on_disk if item.get("medium") != "Memory"]
        wanted = sum(size(item["resources"]["requests"]["ephemeral-storage"]) for item in spec["containers"])
        assert wanted >= sum(sizes), name


def test_a_disk_request_that_is_given_stays() -> None:
    """A disk request set by the operator is kept."""
    resources = {"requests": {"cpu": "1", "memory": "1Gi", "ephemeral-storage": "7Gi"}, "limits": {"memory": "2Gi"}}
    limited = {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "2Gi", "ephemeral-storage": "9Gi"}}
    rendered = helm.template({"gateway": {"resources": resources}, "controller": {"resources": limited}})
    by_name = {name.split("/")[1]: item["resources"] for name, item in containers(rendered)}
    assert by_name["gateway"] == resources
    assert by_name["controller"] == limited


def variables(container: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the environment variables of a container, by name."""
    return {item["name"]: item for item in container["env"]}


def test_ray_itself_gives_its_replicas_the_time_to_drain(preset: Rendered) -> None:
    """After SIGTERM or the preStop hook, a worker pod gives its calls drain_timeout_s to end.

    Kubernetes waits longer than Ray. The head has no replicas and does not wait.
    """
    drain_timeout_s = parse(preset.cluster_yaml).gateway.drain_timeout_s
    for name, group in ray_groups(preset):
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        waits_s = float(variables(container)[TIMEOUT_ENV]["value"])
        if name == "head":
            assert group["rayStartParams"]["num-cpus"] == "0"
            assert waits_s == 0
            continue
        assert usable_s(waits_s) >= drain_timeout_s
        assert spec["terminationGracePeriodSeconds"] >= ray_timeout_s(drain_timeout_s) + 10
        assert container["lifecycle"]["preStop"]["exec"]["command"] == ["headrace", "pod", "drain"]


@pytest.mark.parametrize("drain_timeout_s", [0, 0.5, 1200])
def test_rays_time_follows_the_configuration(drain_timeout_s: float) -> None:
    """A longer drain_timeout_s lengthens every wait of Ray's pods."""
    rendered = helm.template({"config": {"gateway": {"drain_timeout_s": drain_timeout_s}}})
    spec = next(group["template"]["spec"] for name, group in ray_groups(rendered) if name != "head")
    waits_s = float(variables(spec["containers"][0])[TIMEOUT_ENV]["value"])
    assert ray_timeout_s(drain_timeout_s) <= waits_s <= spec["terminationGracePeriodSeconds"] - 10


def test_processes_know_their_pod_and_node(preset: Rendered) -> None:
    """The downward API gives the processes the names of their pod and node.

    With these names, workers and usage records can be joined to Kubernetes objects.
    """
    for _, group in ray_groups(preset):
        by_name = variables(group["template"]["spec"]["containers"][0])
        assert by_name["POD_NAME"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
        assert by_name["NODE_NAME"]["valueFrom"]["fieldRef"]["fieldPath"] == "spec.nodeName"
    gateway = next(item for name, item in containers(preset) if name == "headrace-gateway/gateway")
    assert variables(gateway)["POD_NAME"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"


def test_evictions_leave_workers_and_a_head_that_engines_depend_on(preset: Rendered) -> None:
    """Each worker group and each head has its own disruption budget, given as a number of pods.

    For pods of a RayCluster, Kubernetes cannot evaluate a percentage or maxUnavailable, and would refuse every
    eviction.
    """
    budgets = [item["spec"] for item in preset.all("PodDisruptionBudget")]
    for cluster in preset.all("RayCluster"):
        fault_tolerant = "gcsFaultToleranceOptions" in cluster["spec"]
        least = {group["groupName"]: group["minReplicas"] for group in cluster["spec"]["workerGroupSpecs"]}
        for name, labels, _ in pods(preset):
            if labels.get("ray.io/cluster") != cluster["metadata"]["name"]:
                continue
            (mine,) = (item for item in budgets if selects(item["selector"], labels))
            assert "maxUnavailable" not in mine, name
            group = labels.get("headrace/worker-group", "")
            spare = parse(preset.cluster_yaml).name not in SPARE_NO_NODE
            wanted = max(least[group] - spare, 0) if group else 0 if fault_tolerant else 1
            assert mine["minAvailable"] == wanted, name


def test_budgets_of_ray_can_be_set() -> None:
    """The disruption budget can be set for each worker group and for each head."""
    group = {"name": "g", "minReplicas": 3, "maxReplicas": 3, "podDisruptionBudget": {"minAvailable": 1}}
    cluster = {"name": "blue", "workerGroups": [group], "head": {"podDisruptionBudget": {"minAvailable": 0}}}
    rendered = helm.template({"ray": {"clusters": [cluster]}})
    by_name = {item["metadata"]["name"]: item["spec"] for item in rendered.all("PodDisruptionBudget")}
    assert by_name["headrace-blue-workers-g"]["minAvailable"] == 1
    assert by_name["headrace-blue-ray-head"]["minAvailable"] == 0
