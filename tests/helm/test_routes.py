"""Network access to and from a release: routes, Ingresses, additional policies, DNS, and `helm test`."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.commands.run.pod_secrets import manifests
from tests.helm.test_policies import CLIENTS, ELSEWHERE, HTTP, INTERNET, LINK, network, peers
from tests.support import helm
from tests.support import kubernetes_schemas as schemas
from tests.support.helm import NAMESPACE
from tests.support.network_policies import Peer

pytestmark = pytest.mark.slow

RANKINGS = ("/v2/rerank", "/rerank", "/score")
"""Paths of rankings and scores beside those below /v1."""
CA = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"


@pytest.mark.parametrize("is_routed", [False, True])
def test_the_console_is_routed_if_wanted(is_routed: bool) -> None:
    """Routes and Ingresses expose /v1 and the other paths of rankings and scores. They expose the console only if
    `gateway.consoleRoutes` is set."""
    values = gateway_api(caConfigMap="llm-ca")
    values["gateway"] |= {"ingress": {"enabled": True, "host": "llm.example.com"}, "consoleRoutes": is_routed}
    release = helm.template(values)
    console = {"/", "/console"} if is_routed else set()
    (rule,) = release.only("HTTPRoute")["spec"]["rules"]
    assert {match["path"]["value"] for match in rule["matches"]} == {"/v1", *RANKINGS} | console
    assert {match["path"]["type"] for match in rule["matches"] if match["path"]["value"] in {"/", *RANKINGS}} == {
        "Exact"
    }
    paths = {
        path["path"]: path["pathType"]
        for ingress in release.all("Ingress")
        if ingress["metadata"]["name"].endswith("-http")
        for path in ingress["spec"]["rules"][0]["http"]["paths"]
    }
    assert set(paths) == {"/v1", *RANKINGS} | console
    assert {paths.get(path, "Exact") for path in {"/", *RANKINGS}} == {"Exact"}


def preset_file(name: str) -> Path:
    """Return the file of a preset."""
    return next(path for path in helm.PRESETS if path.stem == name)


def gateway_api(**backend: Any) -> dict[str, Any]:
    """Return chart values that enable routes of the Gateway API and a BackendTLSPolicy. `backend`: further keys of
    `backendTLS`."""
    routes = {"enabled": True, "parentRefs": [{"name": "public"}], "backendTLS": {"enabled": True, **backend}}
    return {"gateway": {"gatewayApi": routes}}


def test_a_gateway_in_front_uses_tls_to_the_gateways() -> None:
    """The BackendTLSPolicy targets the Service of the routes. The certificate that `pod secrets` issues is valid for
    the policy's host name.

    The policy takes the authority's certificate from a ConfigMap with `ca.crt`. Every implementation of the Gateway API
    supports this source.
    """
    release = helm.template(gateway_api(caConfigMap="llm-ca"))
    policy = release.only("BackendTLSPolicy")
    backends = {
        (ref["name"], ref["port"])
        for kind in ("GRPCRoute", "HTTPRoute")
        for ref in release.only(kind)["spec"]["rules"][0]["backendRefs"]
    }
    (target,) = policy["spec"]["targetRefs"]
    assert {name for name, _ in backends} == {target["name"]}
    assert target["kind"] == "Service"
    assert policy["spec"]["validation"] == {
        "hostname": "headrace.headrace.svc",
        "caCertificateRefs": [{"group": "", "kind": "ConfigMap", "name": "llm-ca"}],
    }
    if schemas.without_definition([policy]):
        pytest.skip(f"optional data: no definition of BackendTLSPolicy in {schemas.CRDS}; the rest holds")
    schemas.check_custom(policy)


def test_the_chart_makes_the_authoritys_configmap() -> None:
    """From the text of a CA certificate, the chart makes the ConfigMap that the BackendTLSPolicy names."""
    release = helm.template(gateway_api(caCertificate=CA, hostname="llm.example.com"))
    validation = release.only("BackendTLSPolicy")["spec"]["validation"]
    (named,) = validation["caCertificateRefs"]
    assert release.only("ConfigMap", named["name"])["data"] == {"ca.crt": CA}
    assert validation["hostname"] == "llm.example.com"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (gateway_api(), "set caConfigMap (a ConfigMap with ca.crt) or caCertificate"),
        (gateway_api(caConfigMap="x", caCertificate=CA), "and not both"),
        ({"gateway": {"gatewayApi": {"backendTLS": {"enabled": True}}}}, "set enabled there, or turn it off"),
        ({"gateway": {"autoscaling": {"authenticationRef": {"kind": "TriggerAuthentication"}}}}, "name is empty"),
    ],
)
def test_half_a_setting_is_refused(values: dict[str, Any], words: str) -> None:
    """Incomplete and contradictory settings are refused."""
    with pytest.raises(helm.HelmFailed) as caught:
        helm.template(values)
    assert words in str(caught.value)


def test_each_protocol_has_an_ingress_with_annotations_of_its_own() -> None:
    """gRPC and HTTP have an Ingress each, since an annotation for the protocol applies to a whole Ingress."""
    protocol = "nginx.ingress.kubernetes.io/backend-protocol"
    ingress = {
        "enabled": True,
        "host": "llm.example.com",
        "tlsSecret": "llm",
        "annotations": {"cert-manager.io/cluster-issuer": "public", protocol: "HTTP"},
        "grpcAnnotations": {protocol: "GRPCS"},
        "httpAnnotations": {protocol: "HTTPS"},
    }
    release = helm.template({"gateway": {"ingress": ingress}})
    for name, word, path in (("grpc", "GRPCS", "/cluster.v1.Inference/"), ("http", "HTTPS", "/v1")):
        item = release.only("Ingress", f"headrace-{name}")
        assert item["metadata"]["annotations"] == {"cert-manager.io/cluster-issuer": "public", protocol: word}
        (rule,) = item["spec"]["rules"]
        routes = rule["http"]["paths"]
        assert [route["path"] for route in routes] == [path, *(() if name == "grpc" else RANKINGS)]
        assert {route["backend"]["service"]["port"]["name"] for route in routes} == {name}
    assert len(release.all("Ingress")) == 2


def test_keda_logs_in_to_prometheus() -> None:
    """Both KEDA triggers contain the configured authentication reference and the configured metadata for Prometheus."""
    scaling = {
        "kind": "keda",
        "authenticationRef": {"name": "thanos", "kind": "ClusterTriggerAuthentication"},
        "prometheusMetadata": {"authModes": "bearer"},
    }
    triggers = helm.template({"gateway": {"autoscaling": scaling}}).only("ScaledObject")["spec"]["triggers"]
    assert len(triggers) == 2
    for trigger in triggers:
        assert trigger["authenticationRef"] == scaling["authenticationRef"]
        assert trigger["metadata"]["authModes"] == "bearer"


# ---- policies


def rule(cidr: str, port: int) -> dict[str, Any]:
    """Return an egress rule to the addresses `cidr` at a TCP port."""
    return {"to": [{"ipBlock": {"cidr": cidr}}], "ports": [{"port": port, "protocol": "TCP"}]}


def test_a_site_can_open_more() -> None:
    """Additional rules allow exactly the connections that they name, and only for the named part of the release."""
    mesh = Peer("istio-system", {"app": "istiod"})
    control = {
        "to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "istio-system"}}}],
        "ports": [{"port": 15012, "protocol": "TCP"}],
    }
    named = ("gateway", "controller", "rayHeads", "rayWorkers", "database")
    egress = {"all": [control], **{part: [rule(f"10.9.{at}.1/32", 8200)] for at, part in enumerate(named)}}
    ingress = {"rayHeads": [{"from": [{"namespaceSelector": {}}], "ports": [{"port": 15008, "protocol": "TCP"}]}]}
    release = helm.template({"networkPolicy": {"extraEgress": egress, "extraIngress": ingress}})
    there, allows = peers(release), network(release).allows
    for part in ("gateway", "controller", "head", "worker", "database"):
        assert allows(there[part], mesh, 15012), part
        assert not allows(there[part], mesh, 15010), part
    for at, part in enumerate(("gateway", "controller", "head", "worker", "database")):
        for other in range(5):
            assert allows(there[part], Peer(address=f"10.9.{other}.1"), 8200) is (at == other), (part, other)
    assert allows(ELSEWHERE, there["head"], 15008)
    assert not allows(ELSEWHERE, there["worker"], 15008)


def test_dns_may_live_elsewhere() -> None:
    """If the chart values name a DNS server in another namespace, on another port or on the node, the network policies
    allow only this server. DNS in kube-system is then blocked."""
    to = [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "openshift-dns"}}},
        {"ipBlock": {"cidr": "169.254.20.10/32"}},
    ]
    release = helm.template({"networkPolicy": {"dns": {"to": to, "ports": [53, 5353]}}})
    there, allows = peers(release), network(release).allows
    for part in there.values():
        assert allows(part, Peer("openshift-dns", {"dns": "default"}), 5353, "UDP")
        assert allows(part, Peer(address="169.254.20.10"), 53, "TCP")
        assert not allows(part, Peer("kube-system", {"k8s-app": "kube-dns"}), 53, "UDP")


def test_ray_on_the_nodes_network_reaches_its_gateways() -> None:
    """If Ray pods use the nodes' network, the policies allow the nodes' addresses as sources and as targets.

    Other addresses stay refused.
    """
    host = {"podTemplate": {"spec": {"hostNetwork": True}}}
    group = {"name": "g", "minReplicas": 1, "maxReplicas": 1, **host}
    given = {"ray": {"clusters": [{"name": "blue", "head": host, "workerGroups": [group]}]}}
    stores = {"valkey": {"embedded": {"enabled": True}}}
    release = helm.template(given, stores, {"networkPolicy": {"nodes": ["10.4.0.0/16"]}})
    there, allows = peers(release), network(release).allows
    node = Peer(address="10.4.7.7")
    assert allows(node, there["gateway"], LINK)
    assert allows(node, there["head"], 6379)
    assert allows(there["head"], node, 31234)
    assert allows(there["controller"], node, 8265)
    assert allows(node, there["valkey"], 6379)
    assert not allows(INTERNET, there["head"], 6379)
    assert not allows(INTERNET, there["gateway"], LINK)


# ---- Argo CD and `helm test`


@pytest.mark.parametrize("file", [*map(preset_file, ("local-cpu", "multi-tenant"))], ids=lambda file: file.stem)
def test_each_rendering_is_the_same(file: Path) -> None:
    """Two renderings of a preset are equal. Argo CD would show a random value as out of sync forever."""
    command = ("template", "headrace", helm.CHART, "-n", NAMESPACE, "-f", file)
    assert helm.run(*command) == helm.run(*command)


def test_the_test_reaches_gateways_that_are_closed_to_others() -> None:
    """If a network policy restricts the callers, the pod of `helm test` still reaches the HTTP port of the gateways. It
    reaches no other port of them."""
    clients = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}}}]
    release = helm.template({"networkPolicy": {"clients": clients}})
    there, allows = peers(release), network(release).allows
    assert allows(there["test"], there["gateway"], HTTP)
    assert not allows(there["test"], there["gateway"], CLIENTS)
    assert not allows(there["test"], there["gateway"], LINK)
    assert not allows(ELSEWHERE, there["gateway"], HTTP)
    for kind, name in (("Job", "headrace-test"), ("NetworkPolicy", "headrace-test-gateway")):
        assert release.only(kind, name)["metadata"]["annotations"]["helm.sh/hook"] == "test"


@pytest.mark.parametrize(("status", "name", "code"), [("200", "", 0), ("503", "", 1), ("200", "other.example", 1)])
def test_the_tests_program_judges_a_gateway(tmp_path: Path, status: str, name: str, code: int) -> None:
    """The program of `helm test` passes if the gateway answers 200 with a certificate for the expected name.

    It fails for another status and for another name.
    """
    made = {item["metadata"]["name"]: item["stringData"] for item in secret_objects()}
    for key, text in made["headrace-tls"].items():
        (tmp_path / key).write_text(text)
    (container,) = helm.template({}).only("Job", "headrace-test")["spec"]["template"]["spec"]["containers"]
    program, host, port, server_name, ca = container["args"]
    assert container["command"] == ["python", "-c"]
    assert (host, port, ca) == ("headrace.headrace.svc", "8000", "/tls/ca.crt")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            try:
                with context.wrap_socket(listener.accept()[0], server_side=True) as connection:
                    assert connection.recv(4096).startswith(b"GET /ready HTTP/1.1\r\n")
                    connection.sendall(f"HTTP/1.1 {status} x\r\ncontent-length: 0\r\n\r\n".encode())
            except OSError:
                return  # the client refused the certificate

        thread = threading.Thread(target=answer)
        thread.start()
        arguments = ["127.0.0.1", str(listener.getsockname()[1]), name or server_name, str(tmp_path / "ca.crt")]
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, timeout=60
        )
        thread.join(60)
    assert done.returncode == code, done.stderr


def secret_objects() -> Any:
    """Return the Secrets that `headrace pod secrets` prints."""
    return manifests(NAMESPACE, "headrace", (), None, 30).objects
