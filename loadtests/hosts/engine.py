"""A real engine on two hosts: TP 2, with one rank on each host. An upgrade of the chart adds the engine. Later the
network between the hosts is cut and restored."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from loadtests.children import Children
from loadtests.hosts import load as loads
from loadtests.hosts.cluster import B, Cluster
from loadtests.hosts.load import Call
from loadtests.serving import ours as serving

MODEL = "wide"
STREAMS, TOKENS = 3, (24, 48)
UP_S, SERVED_S, CUT_S = 300.0, 10.0, 10.0
ENGINE = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 16}


@dataclass(slots=True)
class WideEngineResults:
    """Measurements of an engine whose two ranks are on two hosts. Times are in seconds."""

    up_s: float = 0.0
    """Seconds from the upgrade of the chart to the links of the engine's worker."""
    ranks: Sequence[int] = ()
    """Number of ranks on each node."""
    calls: Sequence[Call] = ()
    """Calls before the cut."""
    noticed_s: float | None = None
    again_s: float | None = None
    """Seconds from the return of the cable to the links of the engine's worker."""
    after: Sequence[Call] = field(default_factory=list)


async def play(cluster: Cluster, children: Children, folder: Path, seed: int) -> WideEngineResults:
    """Add an engine with ranks on two hosts, and make calls. Cut the hosts apart, reconnect them, and make calls again.
    Raises RuntimeError and DidNotStart."""
    model, _ = await serving.prepare(children, "llama", folder)
    checkpoint = cluster.claims["models"] / "llama"
    checkpoint.mkdir()
    for file in model.iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    entry = {
        "name": MODEL, "source": "/models/llama", "dtype": "float32", "tensor_parallel_size": 2,
        "allow_cross_node_tensor_parallel": True, "max_model_len": 512, "engine": ENGINE,
    }  # fmt: skip
    results, began = WideEngineResults(), time.monotonic()
    await cluster.upgrade(models=[*cluster.models, entry])
    await _until_linked(cluster)
    results.up_s = time.monotonic() - began
    results.ranks = [ranks(pod.first) for pod in cluster.nodes]
    results.calls = await _make_calls(cluster, seed + 100)
    struck = time.time()
    cluster.fabric.cut(B)
    await asyncio.sleep(CUT_S)
    cluster.fabric.heal(B)
    healed = time.monotonic()
    downs = [
        event.at
        for event in cluster.timeline.since(struck, "worker.disconnected")
        if event.worker.startswith(f"{MODEL}-")
    ]
    results.noticed_s = min(downs) - struck if downs else None
    await _until_linked(cluster)
    results.again_s = time.monotonic() - healed
    results.after = await _make_calls(cluster, seed + 101)
    return results


async def _until_linked(cluster: Cluster) -> None:
    deadline = time.monotonic() + UP_S
    while not cluster.linked(MODEL):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the engine over both hosts had no link within {UP_S:g} s")
        await asyncio.sleep(0.1)


async def _make_calls(cluster: Cluster, seed: int) -> Sequence[Call]:
    load = await loads.begin(cluster, streams=STREAMS, tokens=TOKENS, seed=seed, ramp_s=0.5, model=MODEL)
    await load.until_steady(SERVED_S)
    await asyncio.sleep(SERVED_S)
    await load.end()
    return load.calls


def ranks(first: psutil.Process | None) -> int:
    """Return the number of vLLM's rank processes below the first process of a pod."""
    count = 0
    for process in first.children(recursive=True) if first is not None else ():
        try:
            count += "RayWorker" in " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
    return count
