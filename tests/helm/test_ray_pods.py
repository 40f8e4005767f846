"""Ray's pods: shared memory, the node's disk, and the time and help they get to drain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from ray._private.ray_constants import OBJECT_STORE_MINIMUM_MEMORY_BYTES
from ray._private.utils import resolve_object_store_memory

from tests.helm.test_policies import containers, pods, size
from tests.support import helm
from tests.support.helm import Rendered


def ray_groups(rendered: Rendered) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, group) of the head and of each worker group."""
    for cluster in rendered.all("RayCluster"):
        yield "head", cluster["spec"]["headGroupSpec"]
        for group in cluster["spec"]["workerGroupSpecs"]:
            yield group["groupName"], group


def shared_memory(spec: dict[str, Any]) -> float:
    """Bytes of a pod's /dev/shm."""
    (mount,) = (one for one in spec["containers"][0]["volumeMounts"] if one["mountPath"] == "/dev/shm")
    (volume,) = (one for one in spec["volumes"] if one["name"] == mount["name"])
    assert volume["emptyDir"]["medium"] == "Memory"
    return size(volume["emptyDir"]["sizeLimit"])


def test_the_object_store_lies_in_shared_memory(preset: Rendered) -> None:
    """By Ray's own reckoning it is not larger than /dev/shm, where it would fall to disk, and leaves engines half."""
    for name, group in ray_groups(preset):
        spec = group["template"]["spec"]
        memory = int(size(spec["containers"][0]["resources"]["limits"]["memory"]))
        asked = group["rayStartParams"].get("object-store-memory")
        store = resolve_object_store_memory(memory, None if asked is None else int(asked))
        assert OBJECT_STORE_MINIMUM_MEMORY_BYTES <= store <= min(shared_memory(spec) / 2, 1e9), name


@pytest.mark.parametrize("shm", ["256Mi", "3Gi"])
def test_the_object_store_follows_shared_memory(shm: str) -> None:
    """Any size that the schema allows gives a store that Ray takes."""
    group = {"name": "g", "minReplicas": 0, "maxReplicas": 1, "shmSize": shm}
    rendered = helm.template({"ray": {"clusters": [{"name": "blue", "workerGroups": [group]}]}})
    (store,) = (int(one["rayStartParams"]["object-store-memory"]) for name, one in ray_groups(rendered) if name == "g")
    assert store == min(int(size(shm)) // 2, 10**9)


@pytest.mark.parametrize("shm", ["255Mi"])
def test_too_little_shared_memory_is_refused(shm: str) -> None:
    """Half of it would be less than Ray starts with."""
    group = {"name": "g", "minReplicas": 0, "maxReplicas": 1, "shmSize": shm}
    with pytest.raises(helm.HelmFailed, match="shmSize"):
        helm.template({"ray": {"clusters": [{"name": "blue", "workerGroups": [group]}]}})


def test_what_is_written_to_the_nodes_disk_is_requested(preset: Rendered) -> None:
    """The scheduler knows of every emptyDir on disk, so that no node is filled until the kubelet evicts."""
    for name, _, spec in pods(preset):
        on_disk = [one["emptyDir"] for one in spec.get("volumes", ()) if "emptyDir" in one]
        sizes = [size(one["sizeLimit"]) for one in on_disk if one.get("medium") != "Memory"]
        wanted = sum(size(one["resources"]["requests"]["ephemeral-storage"]) for one in spec["containers"])
        assert wanted >= sum(sizes), name


def test_a_disk_request_that_is_given_stays() -> None:
    """Operators who know what their pods write set it themselves."""
    resources = {"requests": {"cpu": "1", "memory": "1Gi", "ephemeral-storage": "7Gi"}, "limits": {"memory": "2Gi"}}
    limited = {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "2Gi", "ephemeral-storage": "9Gi"}}
    rendered = helm.template({"gateway": {"resources": resources}, "controller": {"resources": limited}})
    found = {name.split("/")[1]: one["resources"] for name, one in containers(rendered)}
    assert found["gateway"] == resources
    assert found["controller"] == limited
