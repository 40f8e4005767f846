"""The processes of a pod report missing settings and answer probes, and only one controller acts at a time.

The tests also check that the Secrets from `pod secrets` match each other.
"""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import Result

from cluster.cli import certificates
from cluster.cli.commands.run import pod
from cluster.cli.commands.run.pod_secrets import manifests
from cluster.cli.commands.run.processes import metrics_page
from cluster.client import Client
from cluster.config.document import parse
from cluster.config.schema import Config
from cluster.controller.controller_metrics import controller_metrics
from cluster.gateway.links.peer_identity import ANY_MODEL, CONTROLLER
from cluster.kube.api import KubeLease
from cluster.observe.exposition import samples
from cluster.process.ports import free_port
from tests.support.kube_api import kube_api

pytestmark = pytest.mark.slow

Run = Callable[..., Result]


def write_secrets(folder: Path) -> Path:
    """Write the Secrets that `pod secrets` makes to files such as link-gateway/tls.crt. Returns `folder`."""
    for manifest in manifests("ns", "headrace", ("llm.example.com",), None, 30).objects:
        data: Any = manifest["stringData"]
        metadata: Any = manifest["metadata"]
        for key, value in data.items():
            file = folder / metadata["name"].removeprefix("headrace-") / key
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(value)
    return folder


def pod_config(files: Path, **ports: int) -> str:
    """Return the cluster.yaml of a pod. `files`: the folder of its Secrets; `ports`: ports by listener."""
    listen = {
        name: f"0.0.0.0:{ports.get(name, at)}"
        for at, name in enumerate(("grpc", "http", "link", "admin", "metrics"), 1)
    }

    def tls(name: str, ca: str) -> dict[str, str]:
        return {
            "cert_file": f"{files}/{name}/tls.crt",
            "key_file": f"{files}/{name}/tls.key",
            ca: f"{files}/{name}/ca.crt",
        }

    client = tls("tls", "x")
    del client["x"]
    return yaml.safe_dump(
        {
            "api_version": "headrace/v1",
            "name": "pod",
            "gateway": {
                "listen": listen,
                "tls": client,
                "link_tls": tls("link-gateway", "ca_file"),
                "drain_timeout_s": 1,
            },
            "link": {"gateways": ["127.0.0.1:1"], "tls": tls("link-controller", "ca_file")},
            "auth": {
                "cluster_secret_file": f"{files}/secrets/cluster",
                "api_keys": {"pepper_file": f"{files}/secrets/key-pepper"},
            },
            "store": {"database_url": f"sqlite:///{files}/ledger.db"},
            "ray": [
                {"name": "blue", "dashboard_url": "http://127.0.0.1:1", "token_file": f"{files}/secrets/auth_token"}
            ],
            "models": [],
        }
    )


def test_a_right_pod_is_said_to_be_right(run: Run, tmp_path: Path) -> None:
    """`pod gateway --check` and `pod controller --check` pass with the files that `pod secrets` makes."""
    file = tmp_path / "cluster.yaml"
    file.write_text(pod_config(write_secrets(tmp_path)))
    for part in ("gateway", "controller"):
        done = run("pod", part, "-f", str(file), "--folder", str(tmp_path / part), "--check")
        assert done.exit_code == 0, done.stderr
        assert "every file that it names is here" in done.stdout


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        (
            "gateway",
            {"gateway": {"listen": {"grpc": "127.0.0.1:1"}}},
            "gateway.listen.grpc: 127.0.0.1:1 is not reachable from outside",
        ),
        ("gateway", {"gateway": {"listen": {"link": "0.0.0.0:0"}}}, "gateway.listen.link: 0.0.0.0:0: a pod's ports"),
        ("gateway", {"gateway": {"processes": 2}}, "gateway.processes: a container holds one process"),
        ("gateway", {"store": {"database_url": ""}}, "store.database_url: not set"),
        ("gateway", {"auth": {"cluster_secret_file": "/nowhere"}}, "auth.cluster_secret_file: /nowhere cannot be read"),
        ("gateway", {"gateway": {"tls": {"key_file": "/nowhere"}}}, "gateway.tls.key_file: /nowhere cannot be read"),
        ("controller", {"link": {"gateways": []}}, "link.gateways: empty"),
        ("controller", {"link": {"tls": None}}, "link.tls: not set"),
        ("controller", {"ray": []}, "ray: empty"),
        (
            "controller",
            {"ray": [{"name": "b", "dashboard_url": "http://x", "token_file": "/nowhere"}]},
            "ray[b].token_file: /nowhere cannot be read",
        ),
    ],
)
def test_what_a_pod_lacks_is_said_before_it_starts(
    run: Run, tmp_path: Path, part: str, change: dict[str, Any], words: str
) -> None:
    """If a setting is invalid or a file is missing, a pod's process exits with code 2 and names the setting.

    The exit code and the name are the same with and without `--check`.
    """

    def laid_over(under: Any, over: Any) -> Any:
        if isinstance(under, dict) and isinstance(over, dict):
            return {key: laid_over(under.get(key), over.get(key, under.get(key))) for key in {**under, **over}}
        return over

    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(laid_over(yaml.safe_load(pod_config(write_secrets(tmp_path))), change)))
    for more in (["--check"], []):
        done = run("pod", part, "-f", str(file), "--folder", str(tmp_path / part), *more)
        assert done.exit_code == 2
        assert words in done.stderr


def scrape(address: str) -> dict[str, list[float]]:
    """Return the values on a metrics page, by the name of the sample."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
        values: dict[str, list[float]] = {}
        for name, _, value in samples(answer.read().decode()):
            values.setdefault(name, []).append(value)
        return values


def health(address: str, service: str = "") -> int:
    """Return the status that grpc.health.v1 reports over a connection without TLS. Raises grpc.RpcError.

    A kubelet sends the same request.
    """
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        return int(stub.Check(request, timeout=2).status)


@pytest.mark.slow
def test_a_gateway_of_a_pod_serves_with_its_secrets_and_ends_in_time(run: Run, tmp_path: Path) -> None:
    """A pod's gateway answers probes without TLS, serves callers with a key over TLS, and ends on SIGTERM."""
    files = write_secrets(tmp_path)
    names = ("grpc", "http", "link", "admin", "metrics")
    ports = {name: free_port() for name in names}
    file = tmp_path / "cluster.yaml"
    file.write_text(pod_config(files, **ports))
    probes = f"127.0.0.1:{free_port()}"
    for words in (("db", "upgrade"), ("tenants", "create", "acme")):
        assert run(*words, "-f", str(file)).exit_code == 0
    key = yaml.safe_load(run("keys", "create", "acme", "--json", "-f", str(file)).stdout)["key"]
    command = [sys.executable, "-m", "cluster.cli.main", "pod", "gateway", "-f", str(file)]
    with subprocess.Popen(
        [*command, "--folder", str(tmp_path / "gateway"), "--health", probes],
        env={**os.environ, "HEADRACE_CACHE_DIR": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            assert wait_until_serving(probes, process), process.communicate()[0]
            assert health(probes, "cluster.v1.Inference") == health_pb2.HealthCheckResponse.SERVING
            expiries = scrape(f"127.0.0.1:{ports['metrics']}")["headrace_certificate_expiry_timestamp_seconds"]
            days = sorted((expiry - time.time()) / 86_400 for expiry in expiries)
            assert len(days) == 3, "the chains of the client ports and of the link, and the link's authority"
            assert [round(each) for each in days[:2]] == [30, 30]
            with Client(
                f"localhost:{ports['grpc']}", api_key=key, tls_ca_file=files / "tls" / "ca.crt", timeout_s=20
            ) as client:
                assert client.models() == []
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()


def wait_until_serving(address: str, process: subprocess.Popen[str]) -> bool:
    """Wait until a process answers a probe, and return whether it serves.

    Returns False if the process ends first or does not answer in time.
    """
    for _ in range(200):
        if process.poll() is not None:
            return False
        try:
            return health(address) == health_pb2.HealthCheckResponse.SERVING
        except grpc.RpcError:
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
    return False


async def test_a_controllers_probe_is_answered_while_it_runs() -> None:
    """Probes are answered while the probe server runs, and no probe is answered afterwards.

    Without an address no server is started.
    """
    address = f"127.0.0.1:{free_port()}"
    async with pod.probe_server(address):
        assert await asyncio.to_thread(health, address) == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError):
        await asyncio.to_thread(health, address)
    async with pod.probe_server(""):
        pass


@pytest.mark.thorough
async def test_one_controller_acts_by_the_lease_and_gives_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A controller acquires the Lease and releases it at the end, even if Ray and the gateways are unreachable.

    The requests are sent over HTTPS, with the pod's service account.
    """
    certificates.make_authority(tmp_path / "ca.crt", tmp_path / "ca.key", 1)
    cert, key = certificates.issue_server(tmp_path, "api", ["127.0.0.1"], 1)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(cert, key)
    (tmp_path / "namespace").write_text("ns")
    config = parse(pod_config(write_secrets(tmp_path)))
    with kube_api(tmp_path, tls) as api:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", api.url.rsplit(":", 1)[1])
        stop = asyncio.Event()
        metrics, gauges = controller_metrics(config)
        address = f"127.0.0.1:{free_port()}"
        running = asyncio.create_task(
            pod.run_pod_controller(
                config, tmp_path / "c", "headrace-controller", stop, tmp_path, metrics=metrics, gauges=gauges
            )
        )
        async with asyncio.timeout(60), metrics_page(metrics, address):
            while not gauges.leads:
                await asyncio.sleep(0.02)
                assert not running.done(), running.exception()
            page = await asyncio.to_thread(scrape, address)
        stop.set()
        await asyncio.wait_for(running, 60)
        assert [value for name, _, value in gauges.samples() if name == "controller_leading"] == [0]
        assert page["headrace_controller_leading"] == [1]
        assert page["process_open_fds"][0] > 3
        assert len(page["headrace_certificate_expiry_timestamp_seconds"]) == 2
        assert api.leases["headrace-controller"]["spec"]["holderIdentity"] == ""
        assert {path.rsplit("/", 1)[0] for _, path in api.seen} <= {
            "/apis/coordination.k8s.io/v1/namespaces/ns/leases",
            "/apis/coordination.k8s.io/v1/namespaces/ns",
        }


async def test_a_lease_is_not_to_be_had_outside_a_pod(tmp_path: Path) -> None:
    """Outside a pod, starting a controller with a Lease raises ValueError."""
    config: Config = parse(pod_config(write_secrets(tmp_path)))
    with pytest.raises(ValueError, match="needs a pod"):
        await pod.run_pod_controller(config, tmp_path, "x", asyncio.Event(), tmp_path / "none")


def test_an_account_of_a_pod_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The API server's address and the namespace are read from the pod, and an IPv6 address gets brackets."""
    (tmp_path / "namespace").write_text("ns\n")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "6443")
    lease = KubeLease.of_this_pod("x", 15, tmp_path)
    assert (lease.url, lease.namespace) == ("https://[fd00::1]:6443", "ns")


# ---- secrets


def handshake_succeeds(server: Path, client: Path | None, name: str, roots: Path) -> bool:
    """Return whether a TLS handshake in memory succeeds with the given server name."""
    serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    serving.load_cert_chain(server / "tls.crt", server / "tls.key")
    dialling = ssl.create_default_context(cafile=str(roots / "ca.crt"))
    if client is not None:
        serving.verify_mode = ssl.CERT_REQUIRED
        serving.load_verify_locations(server / "ca.crt")
        dialling.load_cert_chain(client / "tls.crt", client / "tls.key")
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [serving.wrap_bio(up, down, server_side=True), dialling.wrap_bio(down, up, server_hostname=name)]
    try:
        for _ in range(4):
            for end in reversed(ends):
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLError:
        return False
    return True


def test_the_secrets_fit_together(tmp_path: Path) -> None:
    """The gateway's link certificate is valid for the host names in SRV records.

    The certificate of the client ports is valid for the names of the Service. A client that trusts only one certificate
    authority rejects the certificate of the other authority.
    """
    files = write_secrets(tmp_path)
    for role in ("worker", "controller"):
        for name in (
            "headrace-gateway-0.headrace-links.ns.svc.cluster.local",
            "10-0-0-7.headrace-links.ns.svc.cluster.local",
            "headrace-links",
        ):
            assert handshake_succeeds(files / "link-gateway", files / f"link-{role}", name, files / f"link-{role}"), (
                role,
                name,
            )
    assert not handshake_succeeds(
        files / "link-gateway", files / "link-worker", "elsewhere.example.com", files / "link-worker"
    )
    for name in ("headrace", "headrace.ns.svc", "headrace.ns.svc.cluster.local", "localhost", "llm.example.com"):
        assert handshake_succeeds(files / "tls", None, name, files / "tls"), name
    assert not handshake_succeeds(files / "tls", None, "headrace", files / "link-worker")
    assert not handshake_succeeds(files / "link-gateway", files / "tls", "headrace-links", files / "link-worker")


def test_certificates_say_what_their_holders_may_be(tmp_path: Path) -> None:
    """The certificate of a worker or a controller grants exactly one role."""
    from cryptography import x509

    files = write_secrets(tmp_path)
    for role, uri in (("worker", ANY_MODEL), ("controller", CONTROLLER)):
        certificate = x509.load_pem_x509_certificate((files / f"link-{role}" / "tls.crt").read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == [uri]


def test_the_command_prints_manifests_that_differ_each_time(run: Run) -> None:
    """Each run of `pod secrets` prints new secrets of 64 characters in an immutable Secret."""
    outputs = [run("pod", "secrets", "-n", "ns", "--with-namespace").stdout for _ in range(2)]
    first, second = (list(yaml.safe_load_all(output)) for output in outputs)
    assert [manifest["kind"] for manifest in first] == ["Namespace"] + ["Secret"] * 5
    assert first[0]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert first[-1]["immutable"] is True
    mine, other = first[-1]["stringData"], second[-1]["stringData"]
    assert all(len(mine[key]) == 64 and mine[key] != other[key] for key in mine)
    assert base64.b64encode(first[1]["stringData"]["tls.crt"].encode())
