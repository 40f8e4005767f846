"""Cost of metrics, traces and logs in the gateway: CPU per token with all of them on, compared with all off, and memory
with many tenants. `--only PART` runs some of the parts.

`streams` and `calls`: two gateways, each with a simulated engine, alternate. In one gateway everything is off: its
counters and histograms count nothing, it logs only errors, and its metrics are not scraped. The other gateway has the
default log and metrics, is scraped every few seconds, and sends traces of 1 % of the calls to a collector. `streams`
has long answers. `calls` has short answers, so that the cost per call weighs more.

`tenants`: two gateways have served the same number of calls. The calls of one gateway came from ten tenants, and the
calls of the other gateway from ten thousand.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from cluster.config.schema import Observe
from cluster.observe.exposition import samples
from cluster.process.ports import free_port
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import inference_pb2_grpc as pb_grpc
from loadtests.datasets import fixed
from loadtests.driver import Limits
from loadtests.faces.grpc_stream import GrpcStream
from loadtests.figures import Bound, Figure, missing, ratio_figure
from loadtests.processes import SIMULATED, snapshot
from loadtests.scenarios.common import Contestant, Stage, alternate, first_call, per_round
from loadtests.scenarios.relay import bind, relay_cpu
from loadtests.serving import ours as serving

ROUNDS = 20
SCRAPE_S = 15.0
"""Seconds between two scrapes, as in the chart."""
TRACE_RATIO = 0.01
PROMPT_WORDS = 24
LIMITS = Limits(call_s=60.0, run_s=120.0)
ON, OFF = "metrics, traces and logs on", "metrics, traces and logs off"


@dataclass(frozen=True, slots=True)
class Workload:
    """The calls of one part: `calls` with `tokens` tokens each, at most `concurrency` at once."""

    calls: int
    tokens: int
    concurrency: int


WORKLOADS = {"streams": Workload(256, 128, 256), "calls": Workload(1024, 8, 64)}
TENANTS = "tenants"
CPU = {
    "streams": "gateway CPU per token with metrics, traces of 1 % and logs on against off, 256 streams",
    "calls": "the same, calls of 8 tokens",
}
CPU_BOUND = Bound("<=", 1.03)
FEW, MANY = 10, 10_000
CALLERS = 32
MEMORY = "memory of a gateway that has served 10,000 tenants, above one that has served 10, MB"
MEMORY_BOUND = Bound("<=", 100.0)
SERIES = "tenants with series of their own in the metrics, of 10,000"
SERIES_BOUND = Bound("<=", float(Observe().max_tenant_series + 1))  # with `other`


def observe_on(collector: int) -> dict[str, object]:
    """Return a gateway's configuration section `observe` with logs and traces on. `collector`: port of the trace
    collector."""
    section: dict[str, object] = {"log_level": "info"}
    if "tracing" in Observe.model_fields:
        section["tracing"] = {"endpoint": f"http://127.0.0.1:{collector}", "sample_ratio": TRACE_RATIO}
    return section


OBSERVE_OFF = {"log_level": "error", "access_log": {"sample_ratio": 0}}


async def play(stage: Stage) -> None:
    """Run the parts, and compute the report's rows."""
    if any(stage.options.selects(part) for part in WORKLOADS):
        await _play_cpu(stage)
    if stage.options.selects(TENANTS):
        stage.report.figures += await _tenant_figures(stage)


async def _play_cpu(stage: Stage) -> None:
    options = stage.options
    model, bundle = await serving.prepare(stage.children, "tokenizer", stage.folder)
    room = "max_num_seqs=256&max_num_batched_tokens=65536&kv_blocks=65536"
    speed = "decode_ms=20&prefill_tokens_per_s=100000000&max_model_len=4096"
    source = f"sim://{model}?{speed}&{room}&seed={options.seed}&{serving.plain_tokens(model)}"
    port = free_port()
    sink = stage.children.start(
        "collector", "collector", [sys.executable, "-m", "loadtests.serving.otlp_sink", "--port", str(port)]
    )

    async def listens() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return True
        return False

    await sink.until(listens, "it listens", 60.0)
    pairs: dict[str, serving.Ours] = {}
    for name, section, witness in (("on", observe_on(port), ()), ("off", OBSERVE_OFF, ("--without-metrics",))):
        pairs[name] = await serving.start(
            stage.children, stage.folder, bundle=bundle, source=source, kind=SIMULATED, name=name,
            witness=witness, observe=section,
        )  # fmt: skip
    gateways = [ours.gateway.pid for ours in pairs.values()]
    stage.report.settings["cores"] = bind(options.pin, gateways, [ours.worker.pid for ours in pairs.values()])
    stage.report.settings["traces"] = (
        f"{TRACE_RATIO:.0%} of the calls" if "tracing" in Observe.model_fields else "this build has no tracing"
    )
    async with _scraped(pairs["on"].endpoints["metrics"]):
        for part, workload in WORKLOADS.items():
            if options.selects(part):
                stage.report.figures.append(await _cpu_figure(stage, part, workload, pairs))


async def _cpu_figure(stage: Stage, part: str, workload: Workload, pairs: dict[str, serving.Ours]) -> Figure:
    """Return the report's row on the CPU cost of `part` (`streams` or `calls`). The calls of the part run in turn on
    two gateways: one with metrics, traces and logs, and one without. `pairs`: these gateways, by `on` and `off`."""
    options, arms = stage.options, {}
    for name, description in (("on", ON), ("off", OFF)):
        ours = pairs[name]
        face = GrpcStream(ours.grpc, ours.model, metadata=ours.metadata)
        arms[name] = Contestant(stage.arm(f"{part}, {name}", description), face, ours.roots)
    tokens, concurrency = options.tokens or workload.tokens, options.concurrency or workload.concurrency
    try:
        ready = [arm for arm in arms.values() if await first_call(arm, fixed(1, PROMPT_WORDS, 4, options.seed)[0])]
        await alternate(
            stage, ready, lambda number: fixed(workload.calls, PROMPT_WORDS, tokens, options.seed * 1000 + number),
            rounds=options.rounds or ROUNDS, concurrency=concurrency, limits=LIMITS,
        )  # fmt: skip
    finally:
        for arm in arms.values():
            await arm.face.close()
    on, off = per_round(arms["on"], arms["off"], relay_cpu)
    bound = CPU_BOUND if part == "streams" else None
    return ratio_figure(CPU[part], on, off, bound, scale=1e6, difference_unit="µs/token")


def scrape(address: str) -> list[tuple[str, dict[str, str], float]]:
    """Return the samples of a gateway's metrics page, which is fetched without compression."""
    request = urllib.request.Request(f"http://{address}/metrics", headers={"Accept-Encoding": "identity"})
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - loopback
        return samples(answer.read().decode())


@asynccontextmanager
async def _scraped(address: str) -> AsyncIterator[None]:
    """Scrape a metrics page every SCRAPE_S seconds, in the OpenMetrics format, which has exemplars."""
    request = urllib.request.Request(
        f"http://{address}/metrics", headers={"Accept": "application/openmetrics-text", "Accept-Encoding": "gzip"}
    )

    def fetch() -> None:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - loopback
            answer.read()

    async def keep() -> None:
        while True:
            await asyncio.to_thread(fetch)
            await asyncio.sleep(SCRAPE_S)

    task = asyncio.create_task(keep())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _tenant_figures(stage: Stage) -> Sequence[Figure]:
    """Serve the same number of calls for few and for many tenants. Return two rows of the report: the difference in
    memory, and the number of tenants in the metrics."""
    model, bundle = await serving.prepare(stage.children, "tokenizer", stage.folder)
    source = f"sim://{model}?decode_ms=1&prefill_tokens_per_s=100000000&max_num_seqs=64&{serving.plain_tokens(model)}"
    memory_mb: dict[int, float] = {}
    named = 0
    for count in (FEW, MANY):
        stage.screen.say(f"{count} tenants are made")
        ours = await serving.start(
            stage.children, stage.folder, bundle=bundle, source=source, kind=SIMULATED, name=f"tenants-{count}",
            tenant_count=count, observe={"log_level": "info"},
        )  # fmt: skip
        failures = await _call_all(ours, MANY)
        if failures:
            stage.report.problems.append(f"{count} tenants: {failures} of {MANY} calls failed")
        page = await asyncio.to_thread(scrape, ours.endpoints["metrics"])
        named = len({labels["tenant"] for _, labels, _ in page if "tenant" in labels})
        memory_mb[count] = (
            sum(sample.rss_bytes for sample in snapshot([(ours.gateway.pid, serving.GATEWAY)]).values()) / 1e6
        )
        await asyncio.gather(ours.worker.stop(), ours.gateway.stop())
    stage.report.settings["memory of a gateway, MB, by tenants"] = memory_mb
    if len(memory_mb) < 2:
        return [missing(MEMORY, MEMORY_BOUND, "a gateway did not run")]
    more_mb = memory_mb[MANY] - memory_mb[FEW]
    return [
        Figure(MEMORY, more_mb, bound=str(MEMORY_BOUND), met=more_mb <= MEMORY_BOUND.limit, unit="MB", rounds=1),
        Figure(SERIES, named, bound=str(SERIES_BOUND), met=named <= SERIES_BOUND.limit, unit="tenants", rounds=1),
    ]


async def _call_all(ours: serving.Ours, calls: int) -> int:
    """Make calls with the keys of all tenants in turn. Returns the number of calls that failed."""
    numbers = iter(range(calls))
    failures = 0
    request = pb.ChatRequest(
        model=ours.model, messages=[pb.Message(role="user", content="Hi")], max_tokens=2, temperature=0, ignore_eos=True
    )

    async def caller(stub: Any) -> None:
        nonlocal failures
        for number in numbers:
            metadata = serving.authorization(ours.keys[number % len(ours.keys)])
            try:
                await stub.Chat(request, metadata=metadata, timeout=60.0)
            except grpc.aio.AioRpcError:
                failures += 1

    async with grpc.aio.insecure_channel(ours.grpc) as channel:
        stub = pb_grpc.InferenceStub(channel)
        await asyncio.gather(*(caller(stub) for _ in range(CALLERS)))
    return failures
