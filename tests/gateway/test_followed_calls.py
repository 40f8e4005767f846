"""The gateway's log and metrics lead from a call's request id and trace id to its worker."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from cluster.gateway.calls.records.access_log import LineBudget, is_sampled
from cluster.link.v1 import link_pb2 as link_pb
from cluster.link.v1 import link_pb2_grpc as link_grpc
from cluster.wire.bundle import Bundle
from tests.support.calls import chat, refused
from tests.support.cluster import LOOPBACK, TestCluster, bundle_of, running_cluster, sim_engine, until
from tests.support.gateway_process import gateway_process

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SAMPLED, UNSAMPLED = f"00-{TRACE}-00f067aa0ba902b7-01", f"00-{TRACE[::-1]}-00f067aa0ba902b7-00"
SECRET = "the-secret-of-the-caller"


async def page(cluster: TestCluster) -> Any:
    """Return the metric families of the metrics page in OpenMetrics format, by name."""
    request = urllib.request.Request(
        f"http://{cluster.gateway.endpoints['metrics']}/metrics", headers={"Accept": "application/openmetrics-text"}
    )

    def fetch() -> str:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - loopback
            return str(answer.read().decode())

    text = await asyncio.to_thread(fetch)
    families = text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
    return {family.name: family for family in families}


def exemplars(family: Any) -> set[str]:
    """Return the trace ids of the exemplars of a histogram."""
    return {sample.exemplar.labels["trace_id"] for sample in family.samples if sample.exemplar}


def values(family: Any) -> dict[str, float]:
    """Return the values of a metric family by worker."""
    return {
        sample.labels["worker"]: sample.value for sample in family.samples if sample.name != f"{family.name}_created"
    }


async def test_a_call_leads_to_its_worker(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """The access line of a call has its request id, trace id, counts, times, and its worker with pod and node. The
    call's trace id is an exemplar in the histograms if the caller records the trace."""
    worker = await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle, pod="gpu-a", host="ip-10-0-3-7")
    with capture_logs() as logs:
        for name, trace in (("followed", SAMPLED), ("unsampled", UNSAMPLED), ("untraced", "")):
            metadata = (("x-request-id", name), *((("traceparent", trace),) if trace else ()))
            await cluster.stub.Chat(chat(SECRET, max_tokens=5, ignore_eos=True), metadata=metadata)
        await until(lambda: sum(line["event"] == "call.ended" for line in logs) == 3, "all lines are written")
    followed, unsampled, untraced = (line for line in logs if line["event"] == "call.ended")
    assert (followed["request_id"], followed["trace_id"]) == ("followed", TRACE)
    assert unsampled["trace_id"] == TRACE[::-1]
    assert "trace_id" not in untraced
    assert followed["worker"] == worker.identity.worker_id
    assert (followed["worker_pod"], followed["worker_node"]) == ("gpu-a", "ip-10-0-3-7")
    assert (followed["outcome"], followed["model"], followed["api"]) == ("ok", "sim", "grpc")
    assert (followed["completion_tokens"], followed["prompt_tokens"] > 0) == (5, True)
    assert 0 <= followed["queue_s"] <= followed["ttft_s"] <= followed["duration_s"]
    assert SECRET not in str(logs)
    families = await page(cluster)
    for name in ("time_to_first_token_seconds", "request_duration_seconds"):
        assert exemplars(families[f"headrace_{name}"]) == {TRACE}
    assert exemplars(families["vllm:time_to_first_token_seconds"]) == {TRACE}


async def test_a_call_that_fails_has_a_line(checkpoint: Path, tmp_path: Path) -> None:
    """If no calls are sampled for the access log, a successful call has no access line, and a refused call has one."""
    text = LOOPBACK + "observe: {access_log: {sample_ratio: 0}}\n"
    async with running_cluster(tmp_path / "gateway", text) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle_of(checkpoint))
        with capture_logs() as logs:
            await cluster.stub.Chat(chat(max_tokens=2, ignore_eos=True))
            await refused(cluster.stub.Chat(chat(temperature=9), metadata=(("x-request-id", "bad"),)))
            await cluster.until_idle()
    lines = [line for line in logs if line["event"] == "call.ended"]
    assert [(line["request_id"], line["outcome"]) for line in lines] == [("bad", "invalid_field")]


@pytest.mark.slow
async def test_a_gateway_process_logs_json_without_texts(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every line of a gateway process is a JSON object with the cluster's name. Lines about served or refused calls
    have the request id. No line has text of a prompt, even at the level debug."""
    async with gateway_process(tmp_path / "gateway", LOOPBACK + "observe: {log_level: debug}\n") as gateway:
        metadata = (("x-request-id", "r-1"), ("traceparent", SAMPLED))
        await refused(gateway.stub.Chat(chat(SECRET, temperature=9), metadata=metadata))
        lines: list[dict[str, Any]] = []

        def found() -> bool:
            lines.extend(map(json.loads, capfd.readouterr().err.splitlines()))
            return any(line["event"] == "call.ended" for line in lines)

        await until(found, "the line of the call is there")
    assert {(line["cluster"], line["part"]) for line in lines} == {("test", "gateway")}
    assert [line["trace_id"] for line in lines if line.get("request_id") == "r-1"] == [TRACE]
    assert SECRET not in json.dumps(lines)


async def test_vllms_series_and_the_process_are_exported(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """The metrics page has vLLM's series for each worker, with the engine's counts, and the metrics of the gateway
    process."""
    engine = sim_engine(checkpoint, decode_ms=1)
    worker = (await cluster.add_worker(engine, bundle)).identity.worker_id
    for _ in range(2):
        await cluster.stub.Chat(chat("a text of many blocks " * 20, max_tokens=3, ignore_eos=True))
    counts = engine.counts()
    assert 0 < counts.prefix_hit_tokens < counts.prefix_query_tokens
    link = cluster.gateway.hub.links[0]
    await until(lambda: link.work.decode_tokens == 6 and link.load.running == 0, "the worker has reported")
    families = await page(cluster)
    assert values(families["vllm:prefix_cache_queries"]) == {worker: counts.prefix_query_tokens}
    assert values(families["vllm:prefix_cache_hits"]) == {worker: counts.prefix_hit_tokens}
    assert values(families["vllm:prompt_tokens"]) == {worker: counts.prefix_query_tokens}
    assert values(families["vllm:generation_tokens"]) == {worker: 6}
    assert values(families["vllm:num_preemptions"]) == {worker: 0}
    assert values(families["vllm:num_requests_running"]) == {worker: 0}
    assert families["process_resident_memory_bytes"].samples[0].value > 1e7
    assert families["process_open_fds"].samples[0].value > 3
    assert families["python_gc_collections"].samples


async def test_a_starting_worker_shows_its_weights(cluster: TestCluster) -> None:
    """While a worker starts, the metrics page shows how many bytes of its weights are fetched, and its pod and node.
    The values disappear when the worker's reports end. An invalid report ends the stream of reports."""
    async with grpc.aio.insecure_channel(cluster.gateway.endpoints["link"]) as link:
        call = link_grpc.LinkStub(link).Starting()
        report = link_pb.StartingWorker(
            worker_id="m-1", model="sim", pod="gpu-0", host="n1", gpu="H100",
            fetched_bytes=30, total_bytes=70, bytes_per_s=5,
        )  # fmt: skip
        await call.write(report)
        await until(lambda: bool(cluster.gateway.hub.starting.current), "the report is there")
        families = await page(cluster)
        for name, value in (("fetched_bytes", 30), ("total_bytes", 70), ("fetch_bytes_per_second", 5)):
            assert values(families[f"headrace_weights_{name}"]) == {"m-1": value}
        (info,) = families["headrace_worker_info"].samples
        assert (info.labels["pod"], info.labels["node"], info.labels["gpu"]) == ("gpu-0", "n1", "H100")
        await call.done_writing()
        await until(lambda: not cluster.gateway.hub.starting.current, "it is forgotten")
        wrongs: tuple[dict[str, Any], ...] = ({"bytes_per_s": float("nan")}, {"worker_id": "x" * 300}, {"model": ""})
        for wrong in wrongs:
            call = link_grpc.LinkStub(link).Starting()
            message = link_pb.StartingWorker()
            message.CopyFrom(report)
            for name in wrong:
                setattr(message, name, wrong[name])
            await call.write(message)
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not cluster.gateway.hub.starting.current


@given(st.integers(0, 2**128 - 1), st.floats(0, 1), st.floats(0, 1))
def test_larger_ratios_sample_more(number: int, one: float, other: float) -> None:
    """A call that is sampled at one ratio is also sampled at every larger ratio, whether or not the caller sent a trace
    id. Ratio 0 samples no calls, and ratio 1 samples all."""
    trace, request_id = f"{number:032x}", str(number)
    less, more = sorted((one, other))
    for trace_id in (trace, ""):
        assert is_sampled(trace_id, request_id, less) <= is_sampled(trace_id, request_id, more)
        assert not is_sampled(trace_id, request_id, 0.0)
        assert is_sampled(trace_id, request_id, 1.0)


@pytest.mark.parametrize("traced", [True, False])
def test_the_sample_has_its_size(traced: bool) -> None:
    """Of many calls, the sampled share is close to the ratio."""

    def drawn() -> Iterator[bool]:
        for number in range(20_000):
            trace_id = f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}" if traced else ""
            yield is_sampled(trace_id, f"request-{number}", 0.1)

    assert 0.08 < sum(drawn()) / 20_000 < 0.12


@given(st.integers(1, 50), st.lists(st.floats(0, 2), max_size=200))
def test_lines_are_bounded_and_counted(per_s: int, pauses: list[float]) -> None:
    """In any period of t seconds, at most `per_s` * (t + 1) lines are written. Each written line has the number of
    lines that were dropped directly before it."""
    budget, now, taken, left_out, pending = LineBudget(per_s), 0.0, 0, 0, 0
    for pause in pauses:
        now += pause
        before = budget.take(now)
        if before is None:
            pending += 1
        else:
            assert before == pending
            taken, left_out, pending = taken + 1, left_out + before, 0
    assert taken + left_out + pending == len(pauses)
    assert taken <= per_s * (now + 1) + 1e-6
