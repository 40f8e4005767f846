"""Pod templates in the values: every field reaches the pod, and no field can override what the chart needs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import pytest

from tests.helm.test_policies import containers, pods
from tests.support import helm
from tests.support import kubernetes_schemas as schemas
from tests.support.helm import Rendered

pytestmark = pytest.mark.slow

GROUP = {"name": "gpu", "gpusPerNode": 8, "minReplicas": 2, "maxReplicas": 3}
CONTAINERS = {"gateway": "gateway", "controller": "controller", "head": "ray-head", "worker": "ray-worker"}
"""The chart's container, by part."""
SPREAD = {
    "maxSkew": 1,
    "topologyKey": "topology.example.com/rack",
    "whenUnsatisfiable": "DoNotSchedule",
    "labelSelector": {"matchLabels": {"app.kubernetes.io/name": "headrace"}},
}
AFFINITY = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "rack"}]}}
INIT = {"name": "wait", "image": "busybox:1.37", "command": ["sh", "-c", "true"]}
MOUNT = {"name": "extra", "mountPath": "/extra", "readOnly": True}


def template(part: str) -> dict[str, Any]:
    """Return a pod template that sets every field that platform teams have asked for."""
    return {
        "metadata": {"labels": {"queue": "team-a"}, "annotations": {"karpenter.sh/do-not-disrupt": "true"}},
        "spec": {
            "runtimeClassName": "nvidia",
            "affinity": AFFINITY,
            "topologySpreadConstraints": [SPREAD],
            "priorityClassName": "gold",
            "schedulerName": "kai-scheduler",
            "securityContext": {"supplementalGroups": [44]},
            "hostNetwork": True,
            "terminationGracePeriodSeconds": 900,
            "tolerations": [{"key": "spot", "operator": "Exists"}],
            "initContainers": [INIT],
            "volumes": [{"name": "extra", "configMap": {"name": "extra"}}],
            "containers": [
                {
                    "name": CONTAINERS[part],
                    "env": [{"name": "NCCL_IB_HCA", "value": "mlx5"}],
                    "volumeMounts": [MOUNT],
                    "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
                    "resources": {"claims": [{"name": "gpu"}]},
                },
                {"name": "proxy", "image": "proxy:1"},
            ],
            "resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": "gpu"}],
        },
    }


def values(part: str, given: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return Helm values in which one part of the chart has the pod template `given`. `part`: "gateway", "controller",
    "head" or "worker". `more`: further keys of the worker group."""
    group = {**GROUP, **more, **({"podTemplate": given} if part == "worker" else {})}
    head = {"podTemplate": given} if part == "head" else {}
    made: dict[str, Any] = {"ray": {"clusters": [{"name": "blue", "head": head, "workerGroups": [group]}]}}
    if part in ("gateway", "controller"):
        made[part] = {"podTemplate": given}
    return made


NO_POLICIES = {"networkPolicy": {"enabled": False}}


@functools.cache
def rendered(part: str) -> Rendered:
    """Return the rendered release with a full pod template for one part of the release."""
    return helm.template(values(part, template(part)), NO_POLICIES)


@functools.cache
def plain() -> Rendered:
    """Return the rendered chart without any pod template."""
    return helm.template(values("", {}), NO_POLICIES)


def pod(release: Rendered, part: str) -> dict[str, Any]:
    """Return the rendered pod template of a part: gateway, controller, head or worker."""
    if part in ("head", "worker"):
        spec = release.only("RayCluster")["spec"]
        group = spec["headGroupSpec"] if part == "head" else spec["workerGroupSpecs"][0]
        return dict(group["template"])
    kind = "StatefulSet" if part == "gateway" else "Deployment"
    return dict(release.only(kind, f"headrace-{part}")["spec"]["template"])


def main(template: Mapping[str, Any]) -> dict[str, Any]:
    """Return the chart's own container in a pod template."""
    return dict(template["spec"]["containers"][0])


parts = pytest.mark.parametrize("part", CONTAINERS)


@parts
@pytest.mark.parametrize("field", ["runtimeClassName", "affinity", "priorityClassName", "schedulerName", "hostNetwork"])
def test_a_field_reaches_the_pod(part: str, field: str) -> None:
    """A field of the pod template is copied unchanged to the pod if the chart itself does not set this field."""
    assert pod(rendered(part), part)["spec"][field] == template(part)["spec"][field]


@parts
def test_annotations_and_labels_reach_the_pod(part: str) -> None:
    """The annotations and labels of a pod template in the values are added to those that the chart sets."""
    changed, before = (pod(release, part)["metadata"] for release in (rendered(part), plain()))
    assert changed["labels"] == {**before["labels"], "queue": "team-a"}
    assert changed["annotations"] == {**before.get("annotations", {}), "karpenter.sh/do-not-disrupt": "true"}


@parts
def test_spread_constraints_are_added(part: str) -> None:
    """A topology spread constraint in the values is added to the chart's own constraints."""
    changed, before = (
        pod(release, part)["spec"].get("topologySpreadConstraints", []) for release in (rendered(part), plain())
    )
    assert changed == [*before, SPREAD]


@parts
def test_security_contexts_are_merged(part: str) -> None:
    """A pod template can add a supplementary group and a capability. The chart's own restrictions stay."""
    changed, before = pod(rendered(part), part), pod(plain(), part)
    security = changed["spec"]["securityContext"]
    assert security == {**before["spec"]["securityContext"], "supplementalGroups": [44]}
    assert main(changed)["securityContext"] == {
        **main(before)["securityContext"],
        "capabilities": {"drop": ["ALL"], "add": ["IPC_LOCK"]},
    }


@parts
def test_init_containers_run_before(part: str) -> None:
    """The init containers in the chart's values are added to the pod unchanged."""
    assert pod(rendered(part), part)["spec"]["initContainers"] == [INIT]


@parts
def test_volumes_and_mounts_are_added(part: str) -> None:
    """Volumes of a pod template are added to the chart's own volumes. Its mounts are added to the mounts of the chart's
    container."""
    changed, before = pod(rendered(part), part), pod(plain(), part)
    extra = {"name": "extra", "configMap": {"name": "extra"}}
    assert changed["spec"]["volumes"] == [*before["spec"]["volumes"], extra]
    assert main(changed)["volumeMounts"] == [*main(before)["volumeMounts"], MOUNT]


@parts
def test_a_longer_grace_period_holds(part: str) -> None:
    """A grace period that is longer than the chart's own is used."""
    assert pod(rendered(part), part)["spec"]["terminationGracePeriodSeconds"] == 900


@parts
def test_a_sidecar_and_variables_are_added(part: str) -> None:
    """A sidecar is placed after the chart's container, and variables are added after the chart's own.

    The chart's container keeps its program.
    """
    changed, before = pod(rendered(part), part), pod(plain(), part)
    assert [item["name"] for item in changed["spec"]["containers"]] == [CONTAINERS[part], "proxy"]
    assert main(changed)["env"] == [*main(before)["env"], {"name": "NCCL_IB_HCA", "value": "mlx5"}]
    assert {**main(before)["resources"], "claims": [{"name": "gpu"}]} == main(changed)["resources"]
    kept = ("image", "command", "args", "ports", "lifecycle", "readinessProbe")
    assert {key: main(changed).get(key) for key in kept} == {key: main(before).get(key) for key in kept}


@parts
def test_tolerations_are_added(part: str) -> None:
    """A toleration in the values is added to the chart's own tolerations."""
    extra = {"key": "spot", "operator": "Exists"}
    before = pod(plain(), part)["spec"].get("tolerations", [])
    assert pod(rendered(part), part)["spec"]["tolerations"] == [*before, extra]


@parts
def test_names_of_services_resolve_on_the_nodes_network(part: str) -> None:
    """A pod on its node's network uses the cluster's DNS."""
    assert pod(rendered(part), part)["spec"]["dnsPolicy"] == "ClusterFirstWithHostNet"


@parts
def test_the_api_takes_the_merged_pod(part: str) -> None:
    """The Kubernetes API's strict schemas accept the release with a full pod template."""
    for item in rendered(part).objects:
        if schemas.is_built_in(item):
            schemas.check_built_in(item, schemas.RELEASES[-1])
        elif schemas.CRDS.is_dir():
            schemas.check_custom(item)


def test_other_pods_stay_as_they_are() -> None:
    """The pod template of a worker group changes only the RayCluster object, and within it only the pods of the
    workers."""
    changed = {(item["kind"], item["metadata"]["name"]): item for item in rendered("worker").objects}
    before = {(item["kind"], item["metadata"]["name"]): item for item in plain().objects}
    assert changed.keys() == before.keys()
    assert {key for key in changed if changed[key] != before[key]} == {("RayCluster", "headrace-blue")}
    assert pod(rendered("worker"), "head") == pod(plain(), "head")


def test_an_image_volume_replaces_the_model_cache() -> None:
    """A volume named `models` replaces the chart's model cache, for example with an OCI image."""
    volume = {"name": "models", "image": {"reference": "registry.example.com/models/qwen3:1", "pullPolicy": "Always"}}
    spec = pod(helm.template(values("worker", {"spec": {"volumes": [volume]}})), "worker")["spec"]
    assert [item for item in spec["volumes"] if item["name"] == "models"] == [volume]


def test_the_jobs_run_where_gateways_do() -> None:
    """Jobs take the node selector, the tolerations and the security settings of the gateways' pod template.

    The database Job also takes the volumes and the environment variables of that template, to reach the same
    database with the same certificate authority.
    """
    given = copy.deepcopy(template("gateway"))
    given["spec"]["nodeSelector"] = {"pool": "cpu"}
    extra = {
        "extraEnv": [{"name": "PGSSLROOTCERT", "value": "/pg/ca.crt"}],
        "extraVolumes": [{"name": "pg", "configMap": {"name": "pg-ca"}}],
        "extraVolumeMounts": [{"name": "pg", "mountPath": "/pg", "readOnly": True}],
        "tolerations": [{"key": "cpu-only", "operator": "Exists"}],
        "podTemplate": given,
    }
    release = helm.template({"gateway": extra}, NO_POLICIES)
    for name in ("database", "check", "test"):
        spec = release.only("Job", f"headrace-{name}")["spec"]["template"]["spec"]
        assert (spec["runtimeClassName"], spec["schedulerName"]) == ("nvidia", "kai-scheduler")
        assert spec["nodeSelector"] == {"pool": "cpu"}
        assert {item["key"] for item in spec["tolerations"]} == {"cpu-only", "spot"}
        assert spec["securityContext"]["supplementalGroups"] == [44]
        (container,) = spec["containers"]
        held = {item["mountPath"] for item in container["volumeMounts"]}
        assert ({"/pg", "/extra"} <= held) is (name == "database"), "the check comes before such volumes exist"
        if name == "database":
            variables = {item["name"] for item in container["env"]}
            assert {"PGSSLROOTCERT", "NCCL_IB_HCA", "HEADRACE_DATABASE_PASSWORD"} <= variables
            assert {"pg", "extra", "tmp"} == {item["name"] for item in spec["volumes"]}


def worker(**spec: Any) -> dict[str, Any]:
    """Return Helm values in which the pod template of the worker group has the pod spec `spec`."""
    return values("worker", {"spec": spec})


def container(part: str, **fields: Any) -> dict[str, Any]:
    """Return values with `fields` for the chart's container in the pod template of `part`."""
    return values(part, {"spec": {"containers": [{"name": CONTAINERS[part], **fields}]}})


REFUSED = [
    (worker(runtimeClasName="x"), "additional properties 'runtimeClasName' not allowed"),
    (worker(restartPolicy="Always"), "additional properties 'restartPolicy' not allowed"),
    (container("worker", nmae="x"), "additional properties 'nmae' not allowed"),
    (worker(volumes=[{"emptyDir": {}}]), "missing property 'name'"),
    (
        values("worker", {"metadata": {"labels": {"app.kubernetes.io/component": "x"}}}),
        "app.kubernetes.io/component selects the pods of this release",
    ),
    (values("head", {"metadata": {"labels": {"ray.io/cluster": "x"}}}), "ray.io/cluster selects the pods"),
    (values("gateway", {"metadata": {"annotations": {"headrace/config": "x"}}}), "restarts the pods after a change"),
    (
        worker(terminationGracePeriodSeconds=60),
        "ray.clusters[blue].workerGroups[gpu].podTemplate.spec.terminationGracePeriodSeconds is 60, and the pod drains "
        "for up to 330 s",
    ),
    (values("gateway", {"spec": {"terminationGracePeriodSeconds": 10}}), "set at least 330"),
    (values("controller", {"spec": {"serviceAccountName": "x"}}), "controller.podTemplate.spec.serviceAccountName"),
    (values("head", {"spec": {"serviceAccountName": "x"}}), "belong to its own service account"),
    (values("controller", {"spec": {"automountServiceAccountToken": False}}), "the token for its Lease"),
    (worker(hostNetwork=True), "name the nodes' addresses in networkPolicy.nodes"),
    (values("gateway", {"spec": {"hostNetwork": True}}), "network policies cannot tell such a pod"),
    (worker(volumes=[{"name": "tmp", "emptyDir": {}}]), "the volume tmp is the chart's own"),
    (values("gateway", {"spec": {"volumes": [{"name": "data", "emptyDir": {}}]}}), "the volume data is the chart's"),
    (worker(containers=[{"name": "worker"}]), "the chart's container in this pod is ray-worker"),
    (container("worker", args=["sleep"]), "the chart starts the program: remove it"),
    (container("gateway", command=["sleep"]), "the chart starts the program: remove it"),
    (container("gateway", image="x:1"), "set image.gateway"),
    (container("head", image="x:1"), "set image.worker, or ray.clusters[].image"),
    (container("worker", resources={"requests": {"cpu": "1"}}), "set `resources` beside podTemplate"),
    (container("worker", lifecycle={"preStop": {"sleep": {"seconds": 1}}}), "the chart's own drains the pod"),
    (container("gateway", livenessProbe={"httpGet": {"port": 1}}), "livenessProbe.httpGet: a probe has one handler"),
    (container("worker", env=[{"name": "HOME", "value": "/x"}]), "env: HOME is set by the chart"),
    (container("worker", envFrom=[{"secretRef": {"name": "x"}}]), "name variables in env"),
    (container("worker", volumeMounts=[{"name": "x", "mountPath": "/dev/shm/"}]), "/dev/shm/ is a folder of the chart"),
    (container("gateway", ports=[{"name": "x", "containerPort": 50052}]), "link (50052) is a port of the chart's own"),
]


@pytest.mark.parametrize(("given", "words"), REFUSED)
def test_what_would_break_the_chart_is_refused(given: Mapping[str, Any], words: str) -> None:
    """A pod template that would break the chart is refused, and the error names the key and the remedy."""
    with pytest.raises(helm.HelmFailed) as caught:
        helm.template(given)
    assert words in str(caught.value)


def test_times_of_probes_can_be_changed() -> None:
    """The times of a probe can be changed, for example for a slow disk. The probe's handler stays the chart's own."""
    probe = main(pod(helm.template(container("gateway", startupProbe={"failureThreshold": 300})), "gateway"))[
        "startupProbe"
    ]
    assert probe == {"grpc": {"port": 50054}, "periodSeconds": 2, "failureThreshold": 300}


def test_null_removes_a_field() -> None:
    """A null in a pod template removes a field that the chart sets."""
    spec = pod(helm.template(worker(securityContext={"fsGroup": None})), "worker")["spec"]
    before = pod(plain(), "worker")["spec"]["securityContext"]
    assert spec["securityContext"] == {key: value for key, value in before.items() if key != "fsGroup"}


# ---- the user of the pods


def test_the_cluster_may_choose_the_user() -> None:
    """If the user and group ids are null, no pod sets them. Ray's containers then have the variable USER."""
    ids = {"runAsUser": None, "runAsGroup": None, "fsGroup": None}
    release = helm.template({"podSecurity": ids})
    for name, _, spec in pods(release):
        assert not ids.keys() & spec["securityContext"].keys(), name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
    for name, item in containers(release):
        if "ray-" in name:
            assert {"name": "USER", "value": "headrace"} in item["env"], name


def test_another_user_is_set_everywhere() -> None:
    """User, group and the group of volumes can be set for all pods."""
    release = helm.template({"podSecurity": {"runAsUser": 2000, "fsGroup": 3000, "supplementalGroups": [7]}})
    for name, _, spec in pods(release):
        security = spec["securityContext"]
        assert (security["runAsUser"], security["runAsGroup"], security["fsGroup"]) == (2000, 10001, 3000), name
        assert security["supplementalGroups"] == [7], name


# ---- groups


def test_sets_of_hosts_are_counted_in_pods() -> None:
    """With `numOfHosts`, each replica of a worker group is a set of several pods. The disruption budget keeps all pods
    available except those of one set. A model may use all hosts of a set."""
    models = [{"name": "m", "source": "hf://o/m", "tensor_parallel_size": 8, "pipeline_parallel_size": 4}]
    given = values("", {}, numOfHosts=4, priority=5, minReplicas=2, maxReplicas=2)
    release = helm.template(given, {"config": {"models": models}})
    (group,) = release.only("RayCluster")["spec"]["workerGroupSpecs"]
    assert (group["numOfHosts"], group["priority"], group["replicas"]) == (4, 5, 2)
    assert release.only("PodDisruptionBudget", "headrace-blue-workers-gpu")["spec"]["minAvailable"] == 4
    with pytest.raises(helm.HelmFailed, match="have 8 a node, 16 in all"):
        helm.template(values("", {}, maxReplicas=2), {"config": {"models": models}})


def test_a_groups_network_is_its_own() -> None:
    """Environment variables are set for all Ray containers or for one worker group. In the group's containers, the
    group's value of a variable replaces the common value."""
    both = [{"name": "NCCL_SOCKET_IFNAME", "value": "eth0"}, {"name": "NCCL_DEBUG", "value": "WARN"}]
    given = values("", {}, extraEnv=[{"name": "NCCL_SOCKET_IFNAME", "value": "ib0"}])
    release = helm.template(given, {"ray": {"extraEnv": both}})
    named = [(item["name"], item.get("value")) for item in main(pod(release, "worker"))["env"]]
    assert [value for name, value in named if name == "NCCL_SOCKET_IFNAME"] == ["ib0"]
    assert ("NCCL_DEBUG", "WARN") in named
    assert both[0] in main(pod(release, "head"))["env"]


def test_two_releases_share_priority_classes() -> None:
    """One release creates priority classes with shared names, and another release uses them without creating them."""
    names = {"serving": "llm-serving", "workers": "llm-workers"}
    owner, guest = (helm.template({"priorityClasses": {"create": create, "names": names}}) for create in (True, False))
    assert [item["metadata"]["name"] for item in owner.all("PriorityClass")] == list(names.values())
    assert not guest.all("PriorityClass")
    for release in (owner, guest):
        assert pod(release, "gateway")["spec"]["priorityClassName"] == "llm-serving"
        assert pod(release, "worker")["spec"]["priorityClassName"] == "llm-workers"
    assert not {"priorityClassName"} & pod(helm.template({}), "gateway")["spec"].keys()
