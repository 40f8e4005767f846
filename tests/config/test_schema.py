"""Tests of the schema of cluster.yaml: invalid files are refused with the key's path and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.api.types import ModelSpec
from cluster.config import document, paths
from cluster.config.gateway import is_loopback

ROOT = Path(__file__).parents[2]
HEAD = "api_version: headrace/v1\nname: c\n"
MODEL = "models: [{name: m, source: /models/m}]\n"
KEYS = "auth: {api_keys: {}}\n"
TLS = "{cert_file: /a, key_file: /b, ca_file: /c}"


@pytest.mark.parametrize("file", sorted((ROOT / "deploy").glob("*.yaml")), ids=lambda f: f.name)
def test_shipped_files_load(file: Path) -> None:
    """Every configuration in deploy/ is valid."""
    assert document.load(file).models


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected a mapping"),
        ("a: [", "not YAML"),
        ("api_version: headrace/v9\nname: c\n" + MODEL, "api_version"),
        (HEAD + "models: [{name: m, source: s, engin: {}}]", "models[0].engin: unknown key"),
        (HEAD + "gatway: {}\n" + MODEL, "gatway: unknown key"),
        (HEAD + "gateway: {listen: {grcp: '127.0.0.1:1'}}\n" + MODEL, "gateway.listen.grcp: unknown key"),
        (HEAD + "gateway: {listen: {grpc: nowhere}}\n" + MODEL, "gateway.listen.grpc"),
        (HEAD + "models: [{name: M, source: s}]", "models[0].name"),
        (HEAD + "models: [{name: m, source: ''}]", "models[0].source"),
        (HEAD + "models: [{name: m, source: s, tensor_parallel_size: 0}]", "models[0].tensor_parallel_size"),
        (HEAD + "models: [{name: m, source: s, max_model_len: 3000000000}]", "models[0].max_model_len"),
        (HEAD + "models: [{name: m, source: s, dtype: int3}]", "models[0].dtype"),
        (HEAD + "models: [{name: m, source: s, replicas: {min: 3, max: 2}}]", "max (2) is below min (3)"),
        (HEAD + "models: [{name: m, source: s, replicas: {min: 1, idle_s: 60}}]", "needs min: 0"),
        (HEAD + "models: [{name: m, source: s}, {name: n, source: s, aliases: [m]}]", "'m' is used by"),
        (HEAD + r'models: [{name: "m\n", source: s}]', "models[0].name"),
        (HEAD + r'models: [{name: m, source: s, aliases: ["a\n"]}]', "models[0].aliases[0]"),
        (HEAD + "models: [{name: m, source: s, engine: {port: 1}}]", "models[0].engine.port: is set by Headrace"),
        (HEAD + "models: [{name: m, source: s, engine: {distributed_executor_backend: mp}}]", "placed by Ray"),
        (HEAD + "models: [{name: m, source: s, trust_remote_code: true}]", "weights.allow.remote_code"),
        (HEAD + "models: [{name: m, source: s, load_format: pt}]", "weights.allow.formats"),
        (HEAD + "models: [{name: m, source: s, slo: {target: 1}}]", "models[0].slo.target"),
        (HEAD + "models: [{name: m, source: s, sampling: {temperature: 3}}]", "models[0].sampling.temperature"),
        (HEAD + "models: [{name: m, source: s, sampling: {top_p: 0}}]", "models[0].sampling.top_p"),
        (HEAD + "models: [{name: m, source: s, sampling: {topp: 1}}]", "models[0].sampling.topp: unknown key"),
        (HEAD + "models: [{name: m, source: s, slo: {ttft: 1}}]", "models[0].slo.ttft: unknown key"),
        (HEAD + "scaling: {gpu_budget: {H100: -1}}\n" + MODEL, "scaling.gpu_budget.H100"),
        (HEAD + "scaling: {forecast: false}\n" + MODEL, "scaling always acts on the forecast"),
        (HEAD + "scaling: {cold_start_s: 0}\n" + MODEL, "scaling.cold_start_s"),
        (HEAD + "auth: {}\n" + MODEL, "auth: no caller could be authenticated"),
        (HEAD + "tenants: [{name: acme}]\n" + MODEL, "without auth callers have no tenants"),
        (HEAD + KEYS + "tenants: [{name: acme, class: gold}]\n" + MODEL, "tenants[0].class: 'gold' is none of classes"),
        (
            HEAD + KEYS + "tenants: [{name: acme, limits: {daily_tokens: 0}}]\n" + MODEL,
            "tenants[0].limits.daily_tokens",
        ),
        (HEAD + "store: {stale_after_s: 0}\n" + MODEL, "store.stale_after_s"),
        (
            HEAD + "auth: {client_certificates: [{san: a.example.com, tenant: acme}]}\n" + MODEL,
            "set gateway.tls.client_ca_file",
        ),
        (
            HEAD + KEYS + "ray: [{name: blue, dashboard_url: 'http://head:8265'}]\n" + MODEL,
            "auth.cluster_secret_file: with a Ray cluster",
        ),
        (HEAD + "link: {gateways: ['srv://link.x']}\n" + MODEL, "link.gateways[0]: must be host:port"),
        (HEAD + "link: {gateways: ['dns://x:1']}\n" + MODEL, "link.gateways[0]: must be host:port"),
        (HEAD + "gateway: {processes: 0}\n" + MODEL, "gateway.processes"),
        (HEAD + "gateway: {processes: 65}\n" + MODEL, "gateway.processes"),
        (
            HEAD + "gateway: {processes: 9, listen: {metrics: '127.0.0.1:65518'}}\n" + MODEL,
            "listen.metrics 127.0.0.1:65518: the last process would listen on 127.0.0.1:65536",
        ),
    ],
)
def test_wrong_files_are_refused_by_path(text: str, words: str) -> None:
    """The error for an invalid file names the file, the key's path and the remedy."""
    with pytest.raises(document.ConfigError) as caught:
        document.parse(text, "f.yaml")
    assert words in str(caught.value)
    assert str(caught.value).startswith("f.yaml: ")


def test_a_missing_file_is_one_line() -> None:
    """The error for a missing file is one line."""
    with pytest.raises(document.ConfigError, match="cannot be read"):
        document.load(Path("/nowhere/cluster.yaml"))


@pytest.mark.parametrize("listener", ["grpc", "http", "admin"])
@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "gateway.example.com:1"])
def test_client_ports_stay_on_loopback(listener: str, address: str) -> None:
    """Client ports without authentication may listen on loopback only."""
    with pytest.raises(document.ConfigError, match=rf"listen\.{listener}.*without auth"):
        document.parse(HEAD + f"gateway: {{listen: {{{listener}: '{address}'}}}}\n" + MODEL)


@pytest.mark.parametrize("listener", ["grpc", "http", "admin"])
def test_ports_open_with_auth_and_tls_together(listener: str) -> None:
    """A client or admin port that is not on loopback needs both auth and TLS. The error names the missing section."""
    wide = f"listen: {{{listener}: '0.0.0.0:1'}}"
    tls = "tls: {cert_file: /tls/tls.crt, key_file: /tls/tls.key}"
    with pytest.raises(document.ConfigError, match=r"without auth:.*use every model"):
        document.parse(HEAD + f"gateway: {{{wide}, {tls}}}\n" + MODEL)
    with pytest.raises(document.ConfigError, match=r"without gateway\.tls: API keys would be sent unencrypted"):
        document.parse(HEAD + KEYS + f"gateway: {{{wide}}}\n" + MODEL)
    assert document.parse(HEAD + KEYS + f"gateway: {{{wide}, {tls}}}\n" + MODEL).auth is not None


def test_tenants_stand_over_the_defaults() -> None:
    """A tenant's policy consists of the section `tenant_defaults`, overridden by the tenant's own fields.

    The default paths of secret files are in the cache folder.
    """
    text = "tenant_defaults: {class: batch, models: [m]}\ntenants: [{name: acme, weight: 4}]\n"
    found = document.parse(HEAD + KEYS + text + MODEL)
    (policy,) = found.policies()
    assert (policy.name, policy.priority_class, policy.weight, policy.models) == ("acme", "batch", 4.0, ("m",))
    assert paths.secret_files(found)["auth.api_keys.pepper_file"] == paths.cache_dir() / "key-pepper"


def test_the_link_port_opens_with_certificates_only() -> None:
    """A link port that is not on loopback needs link_tls. A metrics port does not."""
    wide = "gateway: {listen: {link: '0.0.0.0:1', metrics: '0.0.0.0:2'}"
    with pytest.raises(document.ConfigError, match="link_tls"):
        document.parse(HEAD + wide + "}\n" + MODEL)
    assert document.parse(HEAD + wide + f", link_tls: {TLS}}}\n" + MODEL).gateway.link_tls is not None


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("127.0.0.1:1", True), ("127.9.9.9:1", True), ("localhost:1", True), ("[::1]:1", True), ("10.0.0.1:1", False)],
)
def test_loopback(address: str, loopback: bool) -> None:
    """The addresses 127.0.0.0/8 and ::1 and the name localhost count as loopback."""
    assert is_loopback(address) is loopback


def test_what_gateway_processes_share() -> None:
    """Gateway processes share the client ports. Each has its own link and metrics ports, and lists the link ports of
    the other processes."""
    gateway = document.parse(HEAD + "gateway: {processes: 3}\n" + MODEL).gateway
    first, second, third = (gateway.listen.of(process) for process in range(3))
    assert (second.link, third.link) == ("127.0.0.1:50061", "127.0.0.1:50062")
    assert (second.metrics, third.metrics) == ("127.0.0.1:9411", "127.0.0.1:9412")
    assert (first.grpc, first.http) == (third.grpc, third.http)
    assert gateway.siblings(0) == (":50061", ":50062")
    assert gateway.siblings(2) == (":50052", ":50061")
    assert not document.parse(HEAD + MODEL).gateway.siblings(0)


def test_an_entry_as_the_packages_see_it() -> None:
    """Every key of a model's entry is passed on to the model's spec. The initial number of replicas is `replicas.min`,
    but at least 1."""
    text = """
models:
  - name: m
    aliases: [a, meta-llama/Llama-3.1-8B-Instruct]
    source: hf://o/m
    revision: abc
    dtype: bfloat16
    tensor_parallel_size: 2
    pipeline_parallel_size: 3
    max_model_len: 4096
    replicas: {min: 0, max: 4, idle_s: 60}
    gpu: H100
    engine: {max_num_seqs: 7}
    allow_cross_node_tensor_parallel: true
"""
    (model,) = document.parse(HEAD + text).models
    spec = model.spec()
    assert spec == ModelSpec(
        name="m",
        source="hf://o/m",
        aliases=("a", "meta-llama/Llama-3.1-8B-Instruct"),
        revision="abc",
        dtype="bfloat16",
        tensor_parallel_size=2,
        pipeline_parallel_size=3,
        max_model_len=4096,
        min_replicas=0,
        max_replicas=4,
        idle_s=60,
        gpu="H100",
        engine={"max_num_seqs": 7},
        allow_cross_node_tensor_parallel=True,
    )
    assert spec.replicas == 1
