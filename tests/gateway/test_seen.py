"""Metrics as Prometheus reads them, and gRPC reflection as a standard tool uses it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from cluster.observe.definitions import DEFINITIONS, ENGINE_DEFINITIONS, TTFT_BUCKETS
from cluster.wire.bundle import Bundle
from tests.support.calls import chat, refused
from tests.support.cluster import TestCluster, sim_engine

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def scrape(cluster: TestCluster) -> Samples:
    """Return all samples of the metrics page, by name and labels."""
    url = f"http://{cluster.gateway.endpoints['metrics']}/metrics"
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=60).read().decode())
    return {
        (s.name, frozenset(s.labels.items())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


async def test_metrics_tell_what_happened(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """The metrics report requests by outcome, tokens, times, the queue and workers, with the cluster's name and fixed
    buckets."""
    worker = await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle, pod="gpu-a", host="ip-10-0-3-7")
    for _ in range(3):
        await cluster.stub.Chat(chat(max_tokens=5, ignore_eos=True))
    await refused(cluster.stub.Chat(chat(model="nope")))
    await refused(cluster.stub.Chat(chat(temperature=9)))
    samples = await scrape(cluster)

    def value(name: str, **labels: str) -> float:
        return samples[f"headrace_{name}", frozenset({"headrace_cluster": "test", **labels}.items())]

    assert value("requests_total", model="sim", tenant="default", api="grpc", outcome="ok") == 3
    assert value("requests_total", model="", tenant="default", api="grpc", outcome="model_not_found") == 1
    assert value("requests_total", model="", tenant="default", api="grpc", outcome="invalid_field") == 1
    assert value("generation_tokens_total", model="sim", tenant="default") == 15
    assert value("prompt_tokens_total", model="sim", tenant="default") > 0
    assert value("time_to_first_token_seconds_count", model="sim") == 3
    assert value("inter_token_latency_seconds_count", model="sim") >= 3
    assert value("request_duration_seconds_count", model="sim") == 3
    assert value("queue_time_seconds_count", model="sim") == 3
    assert value("worker_up", model="sim", worker=worker.identity.worker_id) == 1
    assert value("worker_info", worker=worker.identity.worker_id, pod="gpu-a", node="ip-10-0-3-7", gpu="") == 1
    assert value("worker_running_requests", model="sim", worker=worker.identity.worker_id) == 0
    assert value("link_connected", api="worker") == 1
    assert value("model_state", model="sim", state="ready") == 1
    assert value("requests_in_flight", model="sim") == 0
    assert value("engine_path_info", worker=worker.identity.worker_id, path="sim", reason="") == 1
    bounds = {dict(labels)["le"] for name, labels in samples if name == "headrace_time_to_first_token_seconds_bucket"}
    assert bounds == {*map(str, TTFT_BUCKETS), "+Inf"}
    assert {name.split("_")[0].split(":")[0] for name, _ in samples} == {"headrace", "vllm", "process", "python"}


def test_every_label_is_of_the_vocabulary() -> None:
    """Every metric label is in the common list of labels, except the labels of build_info."""
    allowed = {
        "headrace_cluster", "model", "version", "tenant", "class", "worker", "api", "outcome", "reason", "limit",
        "state", "gpu", "pod", "node", "file", "path", "ray_cluster", "kind", "object", "hurts",
    }  # fmt: skip
    for name, definition in DEFINITIONS.items():
        if name != "build_info":
            assert set(definition.labels) <= allowed, name
    for name, definition in ENGINE_DEFINITIONS.items():
        assert definition.labels == ("model_name", "worker"), name


async def test_buf_curl_by_reflection(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """`buf curl` finds the service by reflection, makes a call, and gets a readable error for an invalid request."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
    base = f"http://{cluster.gateway.endpoints['grpc']}/cluster.v1.Inference/StreamChat"
    command = [str(Path(sys.executable).parent / "buf"), "curl", "--protocol", "grpc", "--http2-prior-knowledge"]

    async def curl(**body: object) -> subprocess.CompletedProcess[str]:
        arguments = [*command, "-d", json.dumps(body), base]
        return await asyncio.to_thread(
            lambda: subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
        )

    good = await curl(model="sim", messages=[{"role": "user", "content": "Hi"}], max_tokens=4, ignore_eos=True)
    assert good.returncode == 0, good.stderr
    assert '"completionTokens": 4' in good.stdout or '"completionTokens":4' in good.stdout
    bad = await curl(model="sim", messages=[{"role": "king", "content": "Hi"}])
    assert bad.returncode != 0
    assert "messages[0].role" in bad.stderr
    assert "google.rpc.ErrorInfo" in bad.stderr
