"""Policy checks on rendered objects: pod security, requests, probes, selectors, ports, RBAC, and network access."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.commands.run.pod_secrets import manifests
from cluster.config.document import parse
from cluster.gateway.apis.grpc.inference import SERVICE
from tests.support import helm
from tests.support.helm import NAMESPACE, Rendered
from tests.support.network_policies import Network, Peer, selects

CLIENTS, LINK, ADMIN, HTTP, METRICS, PROBES = 50051, 50052, 50053, 8000, 9400, 50054
CONTROLLER_METRICS = 9401
EVERYTHING = next(path for path in helm.PRESETS if path.stem == "multi-tenant")
INSIDE = next(path for path in helm.PRESETS if path.stem == "local-cpu")


def pods(rendered: Rendered) -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """Yield (name, labels, spec) of every pod that would run, with the labels that KubeRay adds."""
    for item in rendered.objects:
        name = item["metadata"]["name"]
        if item["kind"] in ("StatefulSet", "Deployment", "Job"):
            template = item["spec"]["template"]
            yield name, template["metadata"]["labels"], template["spec"]
        if item["kind"] == "CronJob":
            template = item["spec"]["jobTemplate"]["spec"]["template"]
            yield name, template["metadata"]["labels"], template["spec"]
        if item["kind"] == "RayCluster":
            groups = [("head", item["spec"]["headGroupSpec"])]
            groups += [("worker", group) for group in item["spec"]["workerGroupSpecs"]]
            for role, group in groups:
                added = {"ray.io/cluster": name, "ray.io/node-type": role}
                labels = {**group["template"]["metadata"]["labels"], **added}
                yield f"{name}-{group.get('groupName', role)}", labels, group["template"]["spec"]


def containers(rendered: Rendered) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (pod and container, container), including the autoscaler container that KubeRay adds."""
    for name, _, spec in pods(rendered):
        for container in (*spec.get("initContainers", ()), *spec["containers"]):
            yield f"{name}/{container['name']}", container
    for cluster in rendered.all("RayCluster"):
        if cluster["spec"]["enableInTreeAutoscaling"]:
            yield f"{cluster['metadata']['name']}/autoscaler", cluster["spec"]["autoscalerOptions"]


def test_pods_are_restricted(preset: Rendered) -> None:
    """Every pod meets the pod security standard `restricted`, and the root folder of every container is read-only."""
    for name, _, spec in pods(preset):
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security.get("runAsUser", 1) > 0, "without one, OpenShift chooses: " + name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        allowed = {"configMap", "emptyDir", "ephemeral", "persistentVolumeClaim", "secret", "projected"}
        for volume in spec.get("volumes", ()):
            assert volume.keys() - {"name"} <= allowed, f"{name}: {volume}"
    for name, container in containers(preset):
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False, name
        assert security["capabilities"] == {"drop": ["ALL"]}, name
        assert security["readOnlyRootFilesystem"] is True, name
        assert security["privileged"] is False, name
        assert not any("hostPort" in port for port in container.get("ports", ())), name


def test_every_container_says_what_it_needs(preset: Rendered) -> None:
    """Every container requests CPU and memory and limits memory. A pod's shared memory fits within the memory limit."""
    for name, container in containers(preset):
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}, name
        assert "memory" in container["resources"]["limits"], name
    for name, _, spec in pods(preset):
        shared = sum(
            size(volume["emptyDir"]["sizeLimit"])
            for volume in spec.get("volumes", ())
            if volume.get("emptyDir", {}).get("medium") == "Memory"
        )
        assert shared < sum(size(container["resources"]["limits"]["memory"]) for container in spec["containers"]), name


def size(text: str) -> float:
    """Return the number of bytes of a size such as 8Gi."""
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(text[:-2]) * units[text[-2:]]


def test_whatever_is_written_has_a_place(preset: Rendered) -> None:
    """/tmp, HOME and every other folder that a container writes to are writable mounts."""
    for name, _, spec in pods(preset):
        for container in spec["containers"]:
            mounted = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
            values = {env["name"]: env.get("value", "") for env in container.get("env", ())}
            written = [values[key] for key in ("HOME", "HEADRACE_CACHE_DIR", "PGDATA") if key in values]
            arguments = container.get("args", [])
            written += [arguments[at + 1] for at, word in enumerate(arguments) if word == "--folder"]
            for path in ("/tmp", *written):
                assert any(Path(path).is_relative_to(mount) for mount in mounted), f"{name}: {path}"


def test_probes_ask_grpc_health_and_nothing_about_links(preset: Rendered) -> None:
    """Each container has three probes. The readiness probe asks the gRPC health service, which is SERVING
    while the process accepts calls, whatever the state of its links.
    """
    workloads = [*preset.all("StatefulSet"), *preset.all("Deployment")]
    assert len(workloads) >= 2
    for item in workloads:
        for container in item["spec"]["template"]["spec"]["containers"]:
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert probe in container, f"{item['metadata']['name']}: {probe}"
    gateway = next(item for name, item in containers(preset) if name == "headrace-gateway/gateway")
    assert gateway["readinessProbe"]["grpc"] == {"port": PROBES, "service": SERVICE}
    assert gateway["livenessProbe"]["grpc"] == {"port": PROBES}


def test_selectors_meet_exactly_their_pods(preset: Rendered) -> None:
    """Each selector of a Service, budget, monitor or workload selects at least one pod, and no pod of another part."""
    running = list(pods(preset))
    for item in preset.objects:
        spec = item.get("spec", {})
        if item["kind"] == "Service":
            selector: Mapping[str, Any] = {"matchLabels": spec["selector"]}
        elif item["kind"] in ("PodDisruptionBudget", "PodMonitor", "StatefulSet", "Deployment"):
            selector = spec["selector"]
        else:
            continue
        parts = {labels["app.kubernetes.io/component"] for _, labels, _ in running if selects(selector, labels)}
        assert len(parts) == 1, f"{item['kind']} {item['metadata']['name']} selects {parts}"


def test_ports_are_the_programs(preset: Rendered) -> None:
    """Containers and Services name the ports that the configuration listens on, and the target of
    each Service exists.
    """
    listen = parse(preset.cluster_yaml).gateway.listen
    gateway = next(item for name, item in containers(preset) if name == "headrace-gateway/gateway")
    ports = {item["name"]: item["containerPort"] for item in gateway["ports"]}
    for name, address in listen.model_dump().items():
        assert address.endswith(f":{ports[name]}"), name
    assert f"0.0.0.0:{ports['health']}" in gateway["args"]
    controller = next(item for name, item in containers(preset) if name == "headrace-controller/controller")
    for item in controller["ports"]:
        assert f"0.0.0.0:{item['containerPort']}" in controller["args"], item["name"]
    named = {name: {p["name"] for p in spec["containers"][0].get("ports", ())} for name, _, spec in pods(preset)}
    for service in preset.all("Service"):
        for port in service["spec"]["ports"]:
            targets = [
                port["targetPort"] in named[name]
                for name, labels, _ in pods(preset)
                if selects({"matchLabels": service["spec"]["selector"]}, labels)
            ]
            assert targets, service["metadata"]["name"]
            assert all(targets), service["metadata"]["name"]
    for monitor in preset.all("PodMonitor"):
        for name, labels, spec in pods(preset):
            if selects(monitor["spec"]["selector"], labels):
                names = {port["name"] for port in spec["containers"][0]["ports"]}
                assert {item["port"] for item in monitor["spec"]["podMetricsEndpoints"]} <= names, name


def test_links_are_found_before_they_are_ready(preset: Rendered) -> None:
    """The headless Service publishes gateway pods before they are ready.

    The name of its port is a part of the SRV name that workers dial.
    """
    config = parse(preset.cluster_yaml)
    links = preset.only("Service", "headrace-links")["spec"]
    assert links["clusterIP"] == "None"
    assert links["publishNotReadyAddresses"] is True
    (port,) = links["ports"]
    assert f"srv://_{port['name']}._tcp.headrace-links" in config.link.gateways
    for item in preset.all("StatefulSet"):
        if item["metadata"]["name"] == "headrace-gateway":
            assert item["spec"]["serviceName"] == "headrace-links"


def test_gateways_get_the_time_to_drain(preset: Rendered) -> None:
    """The grace period of gateway and worker pods covers the drain and the pause before it."""
    config = parse(preset.cluster_yaml)
    for name, labels, spec in pods(preset):
        if labels["app.kubernetes.io/component"] == "gateway" or labels.get("ray.io/node-type") == "worker":
            grace_s = spec["terminationGracePeriodSeconds"]
            assert grace_s == config.gateway.drain_timeout_s + 30, name
    gateway = next(item for name, item in containers(preset) if name == "headrace-gateway/gateway")
    assert gateway["lifecycle"]["preStop"]["sleep"]["seconds"] < 30


def test_one_gateway_at_a_time_goes(preset: Rendered) -> None:
    """Evictions and updates take down at most one gateway at a time."""
    budget = preset.only("PodDisruptionBudget", "headrace-gateway")["spec"]
    assert budget["maxUnavailable"] == 1
    for kind in ("StatefulSet", "Deployment"):
        for item in preset.all(kind):
            if item["metadata"]["name"] == "headrace-gateway" and kind == "Deployment":
                assert item["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


def test_rights_are_the_least(preset: Rendered) -> None:
    """There is one Role, for one Lease.

    Only the controller and a Ray head with an autoscaler have a service account token.
    """
    assert not preset.all("ClusterRole")
    (role,) = preset.all("Role")
    assert [(rule["resources"], sorted(rule["verbs"])) for rule in role["rules"]] == [
        (["leases"], ["create"]),
        (["leases"], ["get", "update"]),
    ]
    controller = next(item for name, item in containers(preset) if name == "headrace-controller/controller")
    lease = controller["args"][controller["args"].index("--lease") + 1]
    assert role["rules"][1]["resourceNames"] == [lease]
    (binding,) = preset.all("RoleBinding")
    assert [item["name"] for item in binding["subjects"]] == ["headrace-controller"]
    for name, labels, spec in pods(preset):
        scaled = labels.get("ray.io/node-type") == "head" and "serviceAccountName" not in spec
        carries = labels["app.kubernetes.io/component"] == "controller"
        assert spec.get("automountServiceAccountToken", True) is (carries or scaled), name


def test_secrets_that_are_mounted_are_those_that_are_made(preset: Rendered) -> None:
    """`headrace pod secrets` makes every Secret, and every key of a Secret, that a pod needs to start."""
    made = {
        str(item["metadata"]["name"]): set(item["stringData"])  # type: ignore[index,call-overload]
        for item in manifests(NAMESPACE, "headrace", (), None, 30).objects
    }
    wanted: list[tuple[str, str]] = []
    modes = []
    for _, _, spec in pods(preset):
        for volume in spec.get("volumes", ()):
            secret = volume.get("secret", {})
            modes += [secret.get("defaultMode")] if secret else []
            if secret and not secret.get("optional"):
                keys = [item["key"] for item in secret.get("items", ())] or ["tls.crt", "tls.key", "ca.crt"]
                wanted += [(secret["secretName"], key) for key in keys]
        for container in spec["containers"]:
            for item in container.get("env", ()):
                if reference := item.get("valueFrom", {}).get("secretKeyRef"):
                    wanted.append((reference["name"], reference["key"]))
    assert len(wanted) > 10
    assert set(modes) == {0o440}, "others on the node cannot read them; the pod's group can"
    assert [item for item in wanted if item[1] not in made.get(item[0], ())] == []
    for cluster in preset.all("RayCluster"):
        assert "auth_token" in made[cluster["spec"]["authOptions"]["secretName"]], "the key that KubeRay reads"
        assert cluster["spec"]["authOptions"]["mode"] == "token"


# ---- network access


def peers(rendered: Rendered) -> dict[str, Peer]:
    """Return one pod of each component of the chart, by component. Ray's pods have the keys `head` and `worker`."""
    by_part = {}
    for _, labels, _ in pods(rendered):
        part = labels["app.kubernetes.io/component"]
        by_part[labels.get("ray.io/node-type", part)] = Peer(NAMESPACE, labels)
    return by_part


STRANGER = Peer(NAMESPACE, {"app": "of another release"})
ELSEWHERE = Peer("default", {"app": "client"})
INTERNET = Peer(address="93.184.216.34")
PROMETHEUS = Peer("monitoring", {"app": "prometheus"})
OPERATOR = Peer("kuberay", {"app": "operator"})


def site(rendered: Rendered) -> tuple[Peer, Peer, Peer, int]:
    """Return four values for the platform on which the chart is installed (OpenShift or other): the network peers for
    Prometheus, for KubeRay's operator and for the DNS server, and the DNS port."""
    if rendered.all("Route"):
        prometheus = Peer("openshift-user-workload-monitoring", {"app": "prometheus"})
        return prometheus, Peer("openshift-operators", {}), Peer("openshift-dns", {"dns": "default"}), 5353
    return PROMETHEUS, OPERATOR, Peer("kube-system", {"k8s-app": "kube-dns"}), 53


def network(rendered: Rendered) -> Network:
    """Return the network policies of one release."""
    return Network(NAMESPACE, rendered.all("NetworkPolicy"))


def test_each_reaches_what_it_dials(preset: Rendered) -> None:
    """Each part of the release can connect to the parts that it needs: to link ports, Ray's dashboard, Ray's ports and
    DNS.

    Prometheus can connect to its targets.
    """
    there, allows = peers(preset), network(preset).allows
    gateway, controller, head, worker = (there[item] for item in ("gateway", "controller", "head", "worker"))
    assert allows(worker, gateway, LINK)
    assert allows(controller, gateway, LINK)
    assert allows(controller, head, 8265)
    assert allows(worker, head, 6379)
    assert allows(head, worker, 31234)
    assert allows(worker, worker, 40001), "ranks of one engine"
    prometheus, operator, names, dns = site(preset)
    assert allows(prometheus, gateway, METRICS)
    assert allows(prometheus, controller, CONTROLLER_METRICS)
    assert allows(prometheus, worker, 8080)
    assert allows(operator, head, 8265)
    for part in there.values():
        assert allows(part, names, dns, "UDP")


def test_nobody_else_reaches_ray_links_or_the_admin_port(preset: Rendered) -> None:
    """Foreign pods of any namespace and outside addresses cannot connect to Ray's ports, the link port or the admin
    port. A pod of the release can connect to one of these ports only if it needs the port."""
    there, allows = peers(preset), network(preset).allows
    gateway, controller, head, worker = (there[item] for item in ("gateway", "controller", "head", "worker"))
    strangers = (STRANGER, ELSEWHERE, INTERNET)
    for who in strangers:
        for port in (6379, 8265, 10001, 8000, 52365, 8080, 31234):
            assert not allows(who, head, port), (who, port)
            assert not allows(who, worker, port), (who, port)
        for port in (LINK, ADMIN, METRICS, PROBES):
            assert not allows(who, gateway, port), (who, port)
        assert not allows(who, controller, PROBES)
        assert not allows(who, controller, CONTROLLER_METRICS)
    for who in (gateway, head):
        assert not allows(who, gateway, LINK), "only workers and the controller speak on links"
    assert not allows(gateway, head, 8265), "a gateway knows nothing of Ray"
    assert not allows(gateway, head, 6379)
    assert not allows(controller, head, 10001)
    assert not allows(controller, worker, 31234)


def test_callers_reach_the_two_client_ports() -> None:
    """By default every caller reaches the two client ports. If `networkPolicy.clients` is set, only the callers in this
    value reach them."""
    open_to_all, named = helm.template(INSIDE), helm.template(EVERYTHING)
    through = Peer("gateways", {"app": "envoy"})
    platform = Peer("platform", {"app": "shell"})
    for port in (CLIENTS, HTTP):
        assert network(open_to_all).allows(ELSEWHERE, peers(open_to_all)["gateway"], port)
        assert network(open_to_all).allows(INTERNET, peers(open_to_all)["gateway"], port)
        assert network(named).allows(through, peers(named)["gateway"], port)
        assert not network(named).allows(ELSEWHERE, peers(named)["gateway"], port)
    assert network(named).allows(platform, peers(named)["gateway"], ADMIN)
    assert not network(named).allows(through, peers(named)["gateway"], ADMIN)


def test_stores_inside_are_reached_by_their_users_alone() -> None:
    """PostgreSQL accepts connections only from gateways, backups and the Job that creates the tables. Valkey accepts
    connections only from gateways and Ray heads."""
    rendered = helm.template(INSIDE, {"backup": {"enabled": True}})
    there, allows = peers(rendered), network(rendered).allows
    may = {(part, "postgresql") for part in ("gateway", "database", "backup")}
    may |= {("gateway", "valkey"), ("head", "valkey")}
    for source in ("gateway", "database", "backup", "head", "worker", "controller", "valkey", "postgresql"):
        for target, port in (("postgresql", 5432), ("valkey", 6379)):
            assert allows(there[source], there[target], port) is ((source, target) in may), (source, target)
    for who in (STRANGER, ELSEWHERE, INTERNET):
        assert not allows(who, there["postgresql"], 5432)
        assert not allows(who, there["valkey"], 6379)


@pytest.mark.parametrize(
    ("endpoint", "port"), [("http://otel.monitoring:4317", 4317), ("https://otel.monitoring", 4317)]
)
def test_gateways_alone_reach_the_collector(endpoint: str, port: int) -> None:
    """With `observe.tracing`, gateways reach the span collector at its port, and no other pod does.

    Without `observe.tracing`, gateways do not reach it either.
    """
    collector = Peer("monitoring", {"app": "otel"})
    rendered = helm.template(INSIDE, {"config": {"observe": {"tracing": {"endpoint": endpoint}}}})
    there, allows = peers(rendered), network(rendered).allows
    reaching = {name for name, peer in there.items() if allows(peer, collector, port)}
    assert reaching == {"gateway"}
    assert not allows(there["gateway"], ELSEWHERE, port)
    without = helm.template(INSIDE)
    assert not network(without).allows(peers(without)["gateway"], collector, port)


def test_without_a_way_out_there_is_none() -> None:
    """With the airgapped preset no pod reaches an address outside the site, on any port in use."""
    rendered = helm.template(next(item for item in helm.PRESETS if item.stem == "airgapped"))
    allows = network(rendered).allows
    for name, item in peers(rendered).items():
        for port in (53, 80, 443, 5432, 6379, 6443):
            assert not allows(item, INTERNET, port), (name, port)
    assert allows(peers(rendered)["gateway"], Peer(address="10.0.1.7"), 5432)
    assert allows(peers(rendered)["controller"], Peer(address="10.0.0.1"), 6443)
    assert not allows(peers(rendered)["worker"], Peer(address="10.0.1.7"), 443)


def test_the_rule_itself_sees_what_it_should() -> None:
    """Without network policies every connection is allowed. So it is the policies that refuse the connections in the
    other tests."""
    rendered = helm.template(INSIDE, {"networkPolicy": {"enabled": False}})
    assert not rendered.all("NetworkPolicy")
    assert network(rendered).allows(INTERNET, peers(rendered)["head"], 6379)


@pytest.mark.parametrize("kind", ["StatefulSet", "Deployment"])
@pytest.mark.parametrize("scaling", ["none", "hpa", "keda"])
def test_who_decides_the_number_of_gateways(kind: str, scaling: str) -> None:
    """The number of gateways is decided either by the workload itself or by an autoscaler that names the workload.

    Without access to a cluster, as in Argo CD, the manifest has no number that would undo the autoscaler's decision.
    """
    metrics = {"kind": scaling, "customMetrics": True}
    rendered = helm.template({"gateway": {"kind": kind, "autoscaling": metrics}})
    (workload,) = (item for item in rendered.all(kind) if item["metadata"]["name"] == "headrace-gateway")
    assert ("replicas" in workload["spec"]) is (scaling == "none")
    scalers = [*rendered.all("HorizontalPodAutoscaler"), *rendered.all("ScaledObject")]
    assert len(scalers) == (scaling != "none")
    for item in scalers:
        target = item["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) == (kind, "headrace-gateway")
    volumes = {item["name"] for item in workload["spec"]["template"]["spec"]["volumes"]}
    assert ("data" in volumes) is (kind == "Deployment")
    assert ("volumeClaimTemplates" in workload["spec"]) is (kind == "StatefulSet")
