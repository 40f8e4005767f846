"""Two checks of hang detection: a stopped engine must be detected, and hours of prefills must not be taken for a hang.

The hours of prefills are the sum over several workers that run at the same time. The gateway watches each worker
separately, so a false alarm could happen on any of them.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from cluster.v1 import inference_pb2 as pb
from cluster.v1 import inference_pb2_grpc as pb_grpc
from loadtests.faces.grpc_stream import OPTIONS
from loadtests.faults.calls import Caller, CallResult, make_request
from loadtests.serving.fleet import Fleet, SimWorker

HANGS, HANG_AFTER_STEPS, HANG_STEP_MS = 10, 40, 10
PREFILL_WORKERS, PREFILL_RUN_S = 40, 95.0
PROMPT_TOKENS = (16_000, 60_000)
PREFILL_TOKENS_PER_S = 16_000
NOTICED_S = 8.0
CREDIT_S = 0.2
"""Time in seconds after which a worker with a new link has also granted credit."""


def hanging_sources(model: Path, plain: str, seed: int) -> list[str]:
    """Return the model sources of two workers. The first worker's engine hangs after a few steps; the second worker
    takes over the calls.
    """
    common = (
        f"sim://{model}?decode_ms={HANG_STEP_MS}&max_model_len=4096&prefill_tokens_per_s=100000&seed={seed}&{plain}"
    )
    return [f"{common}&fault=hang@step:{HANG_AFTER_STEPS}", common]


def prefilling_source(model: Path, plain: str, seed: int) -> str:
    """Return the `sim://` source of a model whose simulated engine has steps of up to four seconds. `plain`: further
    parameters of the source."""
    room = "max_num_seqs=4&max_num_batched_tokens=65536&kv_blocks=16384&max_model_len=131072"
    return f"sim://{model}?decode_ms=20&prefill_tokens_per_s={PREFILL_TOKENS_PER_S}&{room}&seed={seed}&{plain}"


@dataclass(slots=True)
class Hangs:
    """Results of the runs in which engines hang. `noticed_s`: seconds from an engine's last step to the end of the
    worker's link."""

    noticed_s: list[float] = field(default_factory=list)
    reasons: set[str] = field(default_factory=set)
    calls: list[CallResult] = field(default_factory=list)


async def measure_hangs(fleet: Fleet, count: int) -> Hangs:
    """Let the first worker's engine hang `count` times; return how long the gateway took to notice each hang."""
    out = Hangs()
    caller = Caller(fleet.grpc, fleet.metadata, "hangs")
    stuck = fleet.workers[0]
    try:
        for number in range(count):
            await fleet.until_all_up()
            await asyncio.sleep(CREDIT_S)
            since, steps = time.time(), 3 * HANG_AFTER_STEPS
            requests = [make_request(f"h{number}-{i}", "greedy", fleet.model, steps, 8, number) for i in range(4)]
            calls = [asyncio.create_task(caller.call(request)) for request in requests]
            event = await fleet.link_log.downs(stuck.id, since, NOTICED_S)
            results = await asyncio.gather(*calls)
            out.calls += results
            last_chunks = [
                max(at for at in result.chunks if event and at < event.at) for result in results if result.resumed
            ]
            if event is not None and last_chunks:
                out.noticed_s.append(event.at - max(last_chunks))
                out.reasons.add(event.reason)
            await _until_restarted(fleet, stuck)
    finally:
        await caller.close()
    return out


async def _until_restarted(fleet: Fleet, worker: SimWorker) -> None:
    """Kill the worker's process and wait until a new process of the worker is linked."""
    since, link_log = time.time(), fleet.link_log
    worker.signal(signal.SIGKILL)
    await link_log.downs(worker.id, since, NOTICED_S)

    def back() -> bool:
        gone = False
        for event in link_log.events:
            if event.worker == worker.id and event.at >= since:
                gone |= event.name == "worker.disconnected"
                if gone and event.name == "worker.connected":
                    return True
        return False

    await link_log.until(back, NOTICED_S)


@dataclass(frozen=True, slots=True)
class Prefills:
    """Results of the long prefills, summed over all workers."""

    worker_s: float
    prefills: int
    failed: int
    downs: Sequence[str]


async def prefills(fleet: Fleet, run_s: float, seed: int) -> Prefills:
    """Keep every worker in long prefills for `run_s` seconds and return the results."""
    rng = random.Random(seed)
    began, seen = time.monotonic(), len(fleet.link_log.events)
    done = failed = 0
    async with grpc.aio.insecure_channel(fleet.grpc, options=OPTIONS) as channel:
        stub = pb_grpc.InferenceStub(channel)

        async def caller() -> None:
            nonlocal done, failed
            while time.monotonic() - began < run_s:
                ids = [rng.randrange(700) for _ in range(256)] * (rng.randint(*PROMPT_TOKENS) // 256)
                request = pb.CompleteRequest(model=fleet.model, prompt_token_ids=ids, max_tokens=4, temperature=0.0)
                try:
                    await stub.Complete(request, metadata=fleet.metadata, timeout=120.0)
                    done += 1
                except grpc.aio.AioRpcError:
                    failed += 1

        await asyncio.gather(*(caller() for _ in range(2 * len(fleet.workers))))
    downs = [e.reason for e in fleet.link_log.events[seen:] if e.name == "worker.disconnected"]
    return Prefills((time.monotonic() - began) * len(fleet.workers), done, failed, downs)
