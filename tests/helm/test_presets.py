"""Tests that each Helm preset has the effect that the first lines of its file describe."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config.document import parse
from tests.helm.test_policies import INTERNET, network, peers, pods
from tests.support import helm
from tests.support.helm import Rendered
from tests.support.network_policies import Peer

pytestmark = pytest.mark.slow

SPOT_NOTICE_S = 120
"""Time from a spot notice of Amazon EC2 to the end of the node."""


def preset(name: str) -> Path:
    """Return the file of a preset."""
    return next(path for path in helm.PRESETS if path.stem == name)


def groups(rendered: Rendered) -> dict[str, dict[str, Any]]:
    """Return the worker groups by name."""
    return {item["groupName"]: item for item in rendered.only("RayCluster")["spec"]["workerGroupSpecs"]}


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tensor_parallel_size": 16, "pipeline_parallel_size": 1, "allow_cross_node_tensor_parallel": True},
    ],
)
def test_one_model_over_two_nodes(sizes: dict[str, Any]) -> None:
    """The worker group has enough GPUs for the model in both parallel layouts that the preset names.

    The PodDisruptionBudget lets none of the group's pods be evicted. The pods' containers have the group's network
    settings.
    """
    (model,) = yaml.safe_load(preset("two-nodes").read_text())["config"]["models"]
    rendered = helm.template(preset("two-nodes"), {"config": {"models": [{**model, **sizes}]}})
    (group,) = groups(rendered).values()
    (parsed,) = parse(rendered.cluster_yaml).models
    container = group["template"]["spec"]["containers"][0]
    assert parsed.tensor_parallel_size * parsed.pipeline_parallel_size == 16
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) * group["minReplicas"] == 16
    budget = rendered.only("PodDisruptionBudget", "headrace-blue-workers-h100x8")["spec"]
    assert budget["minAvailable"] == group["minReplicas"] == group["maxReplicas"] == 2
    names = {item["name"] for item in container["env"]}
    assert {"NCCL_IB_HCA", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"} <= names


def test_one_tensor_parallel_group_over_two_nodes_must_be_allowed() -> None:
    """A tensor-parallel group of 16 GPUs over two nodes is refused if the model does not allow it explicitly."""
    (model,) = yaml.safe_load(preset("two-nodes").read_text())["config"]["models"]
    wrong = {**model, "tensor_parallel_size": 16, "pipeline_parallel_size": 1}
    with pytest.raises(helm.HelmFailed, match=r"needs 16 GPUs .* on one node"):
        helm.template(preset("two-nodes"), {"config": {"models": [wrong]}})


def test_spot_nodes_come_first_and_end_within_their_notice() -> None:
    """The autoscaler prefers spot nodes, whose pods end within the spot notice. The head runs on an on-demand node."""
    rendered = helm.template(preset("spot"))
    by_name = groups(rendered)
    spot, steady = by_name["spot"], by_name["on-demand"]
    assert spot["priority"] > steady.get("priority", 0)
    assert (spot["minReplicas"], steady["minReplicas"]) == (0, 2)
    assert spot["template"]["spec"]["terminationGracePeriodSeconds"] <= SPOT_NOTICE_S
    kinds = {name: group["template"]["spec"]["nodeSelector"] for name, group in by_name.items()}
    assert kinds == {name: {"karpenter.sh/capacity-type": name} for name in by_name}
    head = rendered.only("RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]
    assert head["nodeSelector"] == {"karpenter.sh/capacity-type": "on-demand"}


def test_openshift_chooses_the_user() -> None:
    """No pod sets a user or a group, because OpenShift's constraint restricted-v2 would refuse such a pod.

    The database Job trusts the certificate authority of the database.
    """
    rendered = helm.template(preset("openshift"))
    for name, _, spec in pods(rendered):
        for security in (spec["securityContext"], *(item["securityContext"] for item in spec["containers"])):
            assert not {"runAsUser", "runAsGroup", "fsGroup"} & security.keys(), name
    job = rendered.only("Job", "headrace-database")["spec"]["template"]["spec"]
    assert "/database-ca" in {item["mountPath"] for item in job["containers"][0]["volumeMounts"]}
    assert "sslrootcert=/database-ca/ca.crt" in str(job["containers"][0]["args"])
    for route in rendered.all("Route"):
        service = rendered.only("Service", route["spec"]["to"]["name"])
        assert route["spec"]["port"]["targetPort"] in {item["name"] for item in service["spec"]["ports"]}


def test_one_job_fills_the_cache_of_all_groups() -> None:
    """One Job writes every model of the configuration to a volume that all worker groups share.

    Workers wait for the file that the Job writes last.
    """
    rendered = helm.template(preset("airgapped-fill"))
    job = rendered.only("Job", "headrace-models-1")["spec"]["template"]["spec"]
    script = job["containers"][0]["args"][0]
    *_, last = script.strip().splitlines()
    done = shlex.split(last)[1]
    assert last.startswith("touch ")
    filled = {f"/models/{folder}" for folder in re.findall(r"^ *fetch \S+ \S+ (\S+)$", script, re.MULTILINE)}
    assert filled == {model.source for model in parse(rendered.cluster_yaml).models}
    (claim,) = (item["persistentVolumeClaim"] for item in job["volumes"] if "persistentVolumeClaim" in item)
    assert len(groups(rendered)) == 2
    for group in groups(rendered).values():
        spec = group["template"]["spec"]
        assert claim in [item.get("persistentVolumeClaim") for item in spec["volumes"]]
        (wait,) = spec["initContainers"]
        assert f"[ -e {done} ]" in wait["command"][-1]


def test_only_the_job_reaches_the_mirror() -> None:
    """In the preset `airgapped-fill`, only the Job that fills the shared volume with models reaches the site's mirror.
    No pod reaches an address on the internet."""
    rendered = helm.template(preset("airgapped-fill"))
    there, allows, mirror = peers(rendered), network(rendered).allows, Peer(address="10.0.2.9")
    assert [part for part in there if allows(there[part], mirror, 443)] == ["models"]
    for part, item in there.items():
        for port in (53, 80, 443, 5432, 6379, 6443):
            assert not allows(item, INTERNET, port), (part, port)


def test_workers_reach_the_object_store_and_the_metadata_server() -> None:
    """Workers reach the cloud's metadata server and object stores outside the cluster. Gateways do not reach the
    metadata server."""
    rendered = helm.template(preset("object-store"))
    there, allows, metadata = peers(rendered), network(rendered).allows, Peer(address="169.254.169.254")
    assert allows(there["worker"], INTERNET, 443)
    assert allows(there["worker"], metadata, 80)
    assert not allows(there["gateway"], metadata, 80)
    schemes = {model.source.partition("://")[0] for model in parse(rendered.cluster_yaml).models}
    assert schemes == {"s3", "gs"}
    for account in rendered.all("ServiceAccount"):
        if account["metadata"]["name"] == "headrace-ray":
            assert account["metadata"]["annotations"]
