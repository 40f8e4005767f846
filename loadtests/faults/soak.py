"""Soak: short calls at a high rate for a while, and a check of which resources of the gateway have grown.

Resources are counted at rest, before and after the calls, with the callers' connections open: sockets and other open
files, threads, tasks of the event loop. Memory is sampled every second. The slope of the memory covers the last three
quarters of the time.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

from loadtests.faults.calls import Caller, CallResult, make_request
from loadtests.serving.fleet import Fleet

WORKERS, RATE_PER_S, SOAK_S, WARM_S, REST_S = 2, 100.0, 300.0, 15.0, 14.0
TOKENS, WORDS = 8, 6
LAST_PART = 0.75
DRAWS, BLOCKS = 500, 15


def source(model: Path, plain: str, seed: int) -> str:
    """Return the workers' model source. The engine answers as fast as a caller can read."""
    return f"sim://{model}?decode_ms=2&prefill_tokens_per_s=1000000&max_model_len=2048&seed={seed}&{plain}"


@dataclass(frozen=True, slots=True)
class HeldResources:
    """Numbers of resources that the gateway's process uses while no call runs."""

    sockets: int
    files: int
    threads: int
    tasks: int
    peers: Mapping[str, int]
    """Number of sockets by local port, to identify growth."""

    def __str__(self) -> str:
        return f"{self.sockets} sockets, {self.files} other files, {self.threads} threads, {self.tasks} tasks"


@dataclass(frozen=True, slots=True)
class Soak:
    """Results of the soak test. `slope` is the growth of the gateway's memory in MB an hour for each thousand requests
    a second, with its 95 % interval.
    """

    seconds: float
    rate_per_s: float
    calls: int
    failed: int
    before: HeldResources
    after: HeldResources
    rss_bytes: Sequence[tuple[float, int]]
    slope: tuple[float, float, float]
    downs: Sequence[str]
    """Reasons of links that ended during the soak, although no worker was disturbed."""

    def growth(self) -> dict[str, int]:
        """Return how much each resource has grown between the start and the end of the run. Resources that have not
        grown are left out."""
        before, after = asdict(self.before), asdict(self.after)
        names = ("sockets", "files", "threads", "tasks")
        return {name: after[name] - before[name] for name in names if after[name] > before[name]}


def slope(samples: Sequence[tuple[float, int]], rate_per_s: float, seed: int = 0) -> tuple[float, float, float]:
    """Return the slope of a least-squares line through the last part of the samples, then the lower and the upper bound
    of its confidence interval. The interval comes from a block bootstrap."""
    at = np.array([when for when, _ in samples])
    mb = np.array([rss for _, rss in samples]) / 1e6
    kept = at >= at[0] + (at[-1] - at[0]) * (1 - LAST_PART)
    blocks = np.array_split(np.flatnonzero(kept), BLOCKS)
    scale = 3600 / (rate_per_s / 1000)

    def fit(index: np.ndarray[tuple[int], np.dtype[np.int64]]) -> float:
        return float(np.polyfit(at[index], mb[index], 1)[0]) * scale

    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(DRAWS):
        chosen = rng.integers(0, BLOCKS, BLOCKS)
        if len(set(chosen)) > 1:
            draws.append(fit(np.concatenate([blocks[i] for i in chosen])))
    low, high = np.percentile(draws, (2.5, 97.5))
    return fit(np.flatnonzero(kept)), float(low), float(high)


async def soak(fleet: Fleet, told_file: Path, seconds: float, seed: int) -> tuple[Soak, list[CallResult]]:
    """Make calls for `seconds` seconds after a warm-up, and count the gateway's resources at rest before and after the
    calls. Return the results and the calls.

    `told_file`: file to which the gateway's process writes its measurements.
    """
    process = psutil.Process(fleet.gateway_pid)
    caller = Caller(fleet.grpc, fleet.metadata, "soak")
    rng = random.Random(seed)
    samples: list[tuple[float, int]] = []
    calls: list[CallResult] = []

    async def run(for_s: float) -> None:
        began, number = time.monotonic(), 0
        looked = 0.0
        pending: set[asyncio.Task[CallResult]] = set()
        while (now := time.monotonic() - began) < for_s:
            if now - looked >= 1.0:
                looked = now
                samples.append((time.monotonic(), process.memory_info().rss))
            number += 1
            request = make_request(f"s{len(calls)}", "greedy", fleet.model, TOKENS, WORDS, rng.random())
            task = asyncio.create_task(caller.call(request))
            pending.add(task)
            task.add_done_callback(pending.discard)
            task.add_done_callback(lambda done: calls.append(done.result()))
            await asyncio.sleep(max(began + number / RATE_PER_S - time.monotonic(), 0.0))
        await asyncio.gather(*pending)

    seen = len(fleet.link_log.events)
    try:
        await run(WARM_S)
        await asyncio.sleep(REST_S)
        before = await _measure_resources(process, told_file)
        samples.clear()
        warm, began = len(calls), time.monotonic()
        await run(seconds)
        took = time.monotonic() - began
        rate = (len(calls) - warm) / took
        await asyncio.sleep(REST_S)
        after = await _measure_resources(process, told_file)
    finally:
        await caller.close()
    failed = sum(bool(result.error) for result in calls)
    downs = [e.reason for e in fleet.link_log.events[seen:] if e.name == "worker.disconnected"]
    slopes = slope(samples, rate, seed)
    return Soak(took, rate, len(calls) - warm, failed, before, after, samples, slopes, downs), calls


async def _measure_resources(process: psutil.Process, told_file: Path) -> HeldResources:
    told_file.unlink(missing_ok=True)
    process.send_signal(signal.SIGUSR1)
    for _ in range(200):
        if told_file.exists():
            break
        await asyncio.sleep(0.02)
    tasks = json.loads(told_file.read_text())["tasks"]
    sockets = process.net_connections(kind="all")
    ports = Counter(str(getattr(connection.laddr, "port", "unix")) for connection in sockets)
    return HeldResources(len(sockets), process.num_fds() - len(sockets), process.num_threads(), tasks, dict(ports))
